"""Claims in README.md and the reference pages that a program can check."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT, run

README = (ROOT / "README.md").read_text("utf-8")
GUARANTEES = (ROOT / "tests" / "GUARANTEES.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "tests").glob("*.md")]
PAGES += (ROOT / "streamconv").glob("**/*.md")
TEST = re.compile(r"`((?:unit|engine|models|slow)/\w+\.py)::(\w+)`")


def commands() -> list[list[str]]:
    """Return the words of every streamconv command in the README's code blocks and sentences."""
    lines = [line for block in blocks("README.md") for line in block.splitlines()]
    lines += re.findall(r"`(streamconv [^`]+)`", README)
    parts = [part for line in lines for part in line.partition("  #")[0].removeprefix("$ ").split(" && ")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("streamconv ")]


def blocks(name: str, language: str = r"\w*") -> list[str]:
    text = (ROOT / name).read_text("utf-8")
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


def test_readme_is_short_and_no_page_has_long_lines() -> None:
    assert len(README.splitlines()) <= 160
    for page in PAGES:
        if page.parent.name != "benchmarks":  # whose tables are generated
            assert max(map(len, page.read_text("utf-8").splitlines())) <= 120, page


def test_each_promise_names_tests_that_exist() -> None:
    sections = re.split(r"^## ", GUARANTEES, flags=re.MULTILINE)[1:]
    assert len(sections) > 6
    for section in sections:
        promises = re.split(r"^- ", section, flags=re.MULTILINE)[1:]
        assert promises, section
        for promise in promises:
            assert TEST.search(promise), f"no test is named for: {promise}"
    for file, test in TEST.findall(GUARANTEES):
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text("utf-8"), re.MULTILINE), (file, test)
    # Names that TEST does not find, for instance because of a typo in a folder's name.
    assert len(re.findall(r"::test_", GUARANTEES)) == len(TEST.findall(GUARANTEES)) + 1  # the command at the top


def test_the_command_for_a_single_test_names_one_that_exists() -> None:
    ((file, test),) = re.findall(r"pytest .* (tests/\S+)::(test_\w+)$", GUARANTEES, re.MULTILINE)
    assert f"def {test}(" in (ROOT / file).read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_sections_that_links_name_exist() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s:]+#[^)\s]+)\)", page.read_text("utf-8")):
            file, _, anchor = link.partition("#")
            titles = re.findall(r"^#+ (.*)$", (page.parent / file).read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
            assert anchor in anchors, link


@cache
def options_of(command: str) -> set[str]:
    shown = run(command, "--help", cwd=ROOT)
    assert shown.returncode == 0, command
    return set(re.findall(r"(?<![\w-])--?\w[\w-]*", shown.stdout))


def test_commands_in_the_readme_have_only_options_that_exist() -> None:
    found = commands()
    assert {words[0] for words in found} >= {"run", "convert", "verify", "revert", "plan", "models"}
    for words in found:
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= options_of(words[0]), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_named_in_sentences_exist(page: Path) -> None:
    named = set(re.findall(r"`(--[a-z-]+)(?: [\w.]+)?`", page.read_text("utf-8")))
    names = ["run", "convert", "verify", "push", "revert", "plan", "models", "synth"]
    assert named <= set().union(*(options_of(name) for name in names))


def test_ci_runs_the_commands_that_the_readme_gives_to_developers() -> None:
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    for start in ("python3", r"\.venv/bin/ruff"):
        assert re.search(rf"grep -m1 '\^{re.escape(start)} .*' README\.md", ci), start
        assert len(re.findall(rf"^{start} .*$", README, re.MULTILINE)) >= 1, start
    assert ".venv/bin/python -m pytest -m slow" in ci
    assert ".venv/bin/python -m pytest -m slow" in README
