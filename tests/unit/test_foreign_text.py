"""Text that others wrote cannot control a terminal, forge a line or fill a screen, wherever it leaves the program."""

import ast
import logging
import re
import unicodedata
from pathlib import Path

import pytest

import streamconv
from streamconv.cli.layout import Line, error_lines, laid_out
from streamconv.display import LINE_LENGTH, printable, visible
from streamconv.errors import HubError, MappingError, SourceError, UsageError
from streamconv.logs import logger
from streamconv.progress import Progress, job

PACKAGE = Path(streamconv.__file__).parent
ATTACK = "\x1b[2J\x1b[1;1H\x9b2J\r\x08\n\nLooks ok!\u202e\u2066\u2028\u200b\U000e0041\udcff\x00"
ESCAPED = r"\x1b[2J\x1b[1;1H\x9b2J\r\x08\n\nLooks ok!\u202e\u2066\u2028\u200b\U000e0041\udcff\x00"

# The places that write to a terminal, a log or a pipe, and everything that could. All other modules use these.
BORDER = {
    ("cli/start.py", "print"),  # before click is imported
    ("cli/layout.py", "echo"), ("cli/layout.py", "style"), ("cli/command.py", "StreamHandler"),
    ("cli/progress_bar.py", "print"),  # only the sequence that removes the bar
    ("cli/progress_bar.py", "progressbar"),
    ("cli/consent.py", "confirm"),  # only our own words
    ("source/labels.py", "print"),  # in a child process, whose output is a path for its parent
    ("verification/worker.py", "print_exc"),  # when the pipe to the parent is broken
    ("logs.py", "getLogger"), ("__init__.py", "getLogger"), ("cli/command.py", "getLogger"),
    ("cli/progress_bar.py", "getLogger"), ("cli/cluster.py", "getLogger"),
    ("verification/process.py", "getLogger"), ("verification/worker.py", "getLogger"),
}  # fmt: skip
WRITERS = {
    "print", "echo", "echo_via_pager", "secho", "style", "confirm", "prompt", "pause", "progressbar", "StreamHandler",
    "basicConfig", "print_exc", "print_exception", "print_stack", "warn", "getLogger", "writelines",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Cc", "Cf", "Cs", "Co", "Zl", "Zp", "Zs"])
def test_characters_that_control_or_reorder_text_are_escaped(kind: str) -> None:
    codes = [code for code in range(0x110000) if unicodedata.category(chr(code)) == kind and code != ord(" ")]
    for code in codes if len(codes) < 5_000 else codes[::100]:
        shown = visible(f"a{chr(code)}b")
        assert shown.isascii(), hex(code)
        assert shown.isprintable(), hex(code)


@pytest.mark.parametrize("blank", ["\u3164", "\uffa0", "\u115f", "\u1160", "\u2800", "\u034f", "\ufe0f", "\U000e0100"])
def test_characters_that_are_drawn_as_nothing_are_escaped(blank: str) -> None:
    assert visible(f"model{blank}") == "model" + blank.encode("unicode_escape").decode()


@pytest.mark.parametrize(
    "name",
    ["模型.safetensors", "نموذج", "می\u200cخواهم", "क्\u200dष हिन्दी", "Đặc biệt", "e\u0323\u0302", "שָׁלוֹם",
     "C:\\new\\x1b", "👩\u200d🚀 👨\u200d👩\u200d👧 ❤\ufe0f\u200d🔥"],
)  # fmt: skip
def test_honest_names_stay_as_they_are(name: str) -> None:
    assert (visible(name), printable(name)) == (name, name)


def test_accents_are_not_drawn_over_other_lines() -> None:
    assert visible("a" + "\u0301" * 50) == "a" + "\u0301" * 4 + r"\u0301" * 46


def test_line_is_escaped_once_and_stays_one_short_line() -> None:
    assert visible(ATTACK) == visible(visible(ATTACK)) == ESCAPED
    for text in ("x" * 1_000_000, "\x1b" * 1_000_000, "\u0301" * 1_000_000):
        line = visible(f"{text} Use --force.")
        assert len(line) == LINE_LENGTH
        assert line.endswith(" Use --force.")
        assert len(printable(text)) <= 800


@pytest.mark.parametrize("columns", [None, 40, 80])
def test_no_part_of_a_line_controls_the_terminal_or_begins_a_line(columns: int | None) -> None:
    padding = " " * 100
    for text in (ATTACK, f"{'x' * 79} Looks ok!", f"{padding}Looks ok!", f"`{'x' * 79} Looks ok!{padding}`"):
        for line in (text, Line(text, text, 0, "red", True, text), Line("", text), *error_lines(text, [text])):
            printed = laid_out(line, columns).replace("\x1b[31m", "").replace("\x1b[1m", "").replace("\x1b[0m", "")
            first, *others = printed.split("\n")
            assert all(each.isprintable() for each in (first, *others))
            assert all(each.startswith("  ") for each in others)
            assert columns is not None or not others


@pytest.mark.parametrize("kind", [SourceError, UsageError, HubError])
def test_message_of_an_error_is_safe_to_print(kind: type[streamconv.StreamconvError]) -> None:
    assert str(kind(f"{ATTACK} is empty.")) == f"{ESCAPED} is empty."
    lines = str(MappingError(f"{ATTACK}:", [f"missing: {ATTACK}"] * 2)).splitlines()
    assert lines == [f"{ESCAPED}:", f"  missing: {ESCAPED}", f"  missing: {ESCAPED}"]


def test_log_records_are_safe_to_show_with_any_handler(caplog: pytest.LogCaptureFixture) -> None:
    log = logger("streamconv.test")
    log.warning("%s: %s at %d of %.1f", Path(ATTACK.replace("\0", "")), SourceError(ATTACK), 3, 0.5)
    assert caplog.messages == [f"{ESCAPED.removesuffix(chr(92) + 'x00')}: {ESCAPED} at 3 of 0.5"]
    assert logging.getLogger("streamconv.test").filters == logger("streamconv.test").filters
    assert len(log.filters) == 1


def test_only_known_places_write_to_a_terminal_or_a_log() -> None:
    """A new output cannot forget to escape what it shows, since it has to go through the functions that do."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call):
                function = node.func
                called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
                if called in WRITERS:
                    found.add((name, called))
            assert not (
                isinstance(node, ast.Attribute) and re.match(r"sys\.\w*std(out|err)\w*\.write", ast.unparse(node))
            )
    assert found == BORDER


def test_log_messages_are_templates_whose_arguments_are_escaped() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("_log.", "self._log.")):
                template = node.args[0]
                choices = [template.body, template.orelse] if isinstance(template, ast.IfExp) else [template]
                assert all(isinstance(each, ast.Constant) for each in choices), (path, ast.unparse(node))


def test_steps_of_progress_are_safe_to_print() -> None:
    seen: list[str] = []

    @job
    def work(progress: Progress) -> None:
        progress(f"checking {ATTACK}", 0, 1, "steps")

    work(progress=lambda step, done, total, unit: seen.append(step))
    assert seen == [f"checking {ESCAPED}"]
