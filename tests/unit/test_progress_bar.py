"""Progress: one bar in a terminal, removed when its step is done; lines in a log."""

import io
import logging
import re
import sys
import time
from collections.abc import Callable

import pytest

from streamconv.cli import progress_bar
from streamconv.cli.progress_bar import REMOVE_BAR, ProgressReport

Report = Callable[..., str]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    """Return a function that reports steps, a second apart, and returns what was printed on stderr."""

    def report(stream: io.StringIO, *steps: tuple[str, int, int, str], columns: int = 80, seconds: float = 1) -> str:
        now = 0.0
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(time, "monotonic", lambda: now)
        with ProgressReport() as progress:
            for step in steps:
                progress(*step)
                now += seconds
        return stream.getvalue()

    return report


def drawn(text: str) -> list[str]:
    """Return the bars that were drawn one over the other."""
    return [bar.strip() for bar in re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", text).split("\r") if bar.strip()]


def test_bar_shows_sizes_speed_and_remaining_time_and_is_removed(report: Report) -> None:
    shown = report(Terminal(), *(("writing x", done * 10**9, 4 * 10**9, "bytes") for done in (1, 2, 3)))
    first, second, third = drawn(shown)
    assert first.endswith("1.0/4.0 GB")
    assert second.endswith("2.0/4.0 GB  1,000 MB/s  0:00:02")  # what was there when the step began is not speed
    assert third.endswith("3.0/4.0 GB  1,000 MB/s  0:00:01")
    assert re.fullmatch(r"writing x  ━+─+  3\S+ GB.*", third)
    assert shown.endswith(REMOVE_BAR)


def test_names_in_a_step_control_neither_the_bar_nor_a_log(report: Report) -> None:
    step = "checking \x1b[2J\x9b2J\r\nLooks ok!\u202e" + "x" * 10_000
    escaped = r"checking \x1b[2J\x9b2J\r\nLooks ok!\u202exxx"
    for total in (1, 4 * 10**9):
        (bar,) = drawn(report(Terminal(), (step, 0, total, "bytes"), columns=150))
        assert bar.startswith(escaped)
        assert bar.isprintable()
        assert len(bar) < 150
    line, empty = report(io.StringIO(), (step, 0, 1, "steps")).split("\n")
    assert (line.startswith(escaped), line.isprintable(), len(line) < 2_500, empty) == (True, True, True, "")


def test_bar_fits_into_the_terminal(report: Report) -> None:
    steps = [(f"writing model-{'0' * length}.safetensors", 10**9, 4 * 10**9, "bytes") for length in range(80)]
    for columns in (60, 80, 200):
        lines = drawn(report(Terminal(), *steps, *steps, columns=columns))
        assert {len(line) for line in lines} == {columns - 3}  # ^C fits into the line, too, which is then cleared


def test_bar_needs_only_the_characters_of_the_terminal(report: Report) -> None:
    plain = Terminal()
    plain.encoding = "ascii"  # type: ignore[misc]
    assert report(plain, ("writing x", 10**9, 4 * 10**9, "bytes")).isascii()


def test_step_without_parts_is_shown_without_a_bar(report: Report) -> None:
    shown = report(Terminal(), ("starting torch", 0, 1, "steps"), ("comparing", 3, 15, "steps"))
    assert drawn(shown)[0] == "starting torch"
    assert drawn(shown)[1].endswith("  3/15 steps")


def test_bar_does_not_interpret_the_text_of_a_server(report: Report) -> None:
    assert drawn(report(Terminal(), ("503 [/bold] %(bar)s %s", 0, 1, "steps"))) == ["503 [/bold] %(bar)s %s"]


def test_log_lines_are_printed_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress_bar, "DRAW_INTERVAL_SECONDS", 0)
    logger, handler = logging.getLogger("streamconv.x"), logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger("streamconv"), "handlers", [handler])
    with ProgressReport() as progress:
        progress("writing x", 10**9, 4 * 10**9, "bytes")
        logger.warning("trying again")
        progress("writing x", 2 * 10**9, 4 * 10**9, "bytes")
    before, _, after = sys.stderr.getvalue().partition("trying again\n")  # type: ignore[attr-defined]
    assert before.endswith(REMOVE_BAR)
    assert re.search(r"2\.0/4\.0 GB  [\d,]+ MB/s", drawn(after)[0])  # the speed since the step began
    assert handler.filters == []


def test_log_has_a_line_per_step_and_one_now_and_then(report: Report) -> None:
    steps = [("writing x", done * 10**8, 4 * 10**9, "bytes") for done in range(25)]
    assert report(io.StringIO(), *steps, ("reading x", 0, 1, "steps")).splitlines() == [
        "writing x",
        "writing x: 1.0/4.0 GB, 100 MB/s, 0:00:30",
        "writing x: 2.0/4.0 GB, 100 MB/s, 0:00:20",
        "reading x",
    ]
    assert progress_bar.LOG_INTERVAL_SECONDS == 10
