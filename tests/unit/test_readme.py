"""The README's claims that a program can hold against the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    named = re.findall(r"\b(test_\w+)(\.py)?", text)
    assert len(named) > 15
    files = list((ROOT / "tests").glob("test_*.py"))
    known = {path.stem for path in files}
    for path in files:
        known |= set(re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE))
    assert {name for name, _ in named} <= known
    assert "…" not in text[text.index("## What is promised") : text.index("## What is checked")]
