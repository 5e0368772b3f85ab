"""Claims in README.md that a program can check."""

import re

from tests.support import ROOT


def test_readme_names_only_tests_that_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    named = re.findall(r"\b(test_\w+)(\.py)?", text)
    assert len(named) > 15
    files = list((ROOT / "tests").glob("*/test_*.py"))
    known = {path.stem for path in files}
    for path in files:
        known |= set(re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE))
    assert {name for name, _ in named} <= known
    assert "…" not in text[text.index("## What is promised") : text.index("## What is checked")]
