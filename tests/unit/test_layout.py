"""Text for a terminal is wrapped at words and coloured; in a pipe it is neither."""

import fcntl
import io
import os
import pty
import struct
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from streamconv.cli import units
from streamconv.cli.layout import Line, columns_of, error_lines, folded, indented, laid_out, print_wrapped
from streamconv.errors import MappingError

Printed = Callable[..., str]
LONG = "the saved image processor makes the original's pixels, and both models compute the same from them at 224x224"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Printed:
    """Return a function that prints lines on a stream and returns the text."""

    def printed(*lines: str | Line, stream: type[io.StringIO] = Terminal, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        file = stream()
        print_wrapped(lines, file)
        return file.getvalue()

    return printed


def test_text_is_wrapped_at_words_under_its_own_start(printed: Printed) -> None:
    line = Line("ok       ", LONG, colour="green", label="load          ")
    assert click.unstyle(printed(line)).splitlines() == [
        "load          ok       the saved image processor makes the original's pixels,",
        "                       and both models compute the same from them at 224x224",
    ]
    assert printed(f"  {LONG}").splitlines() == [
        "  the saved image processor makes the original's pixels, and both models compute",
        "    the same from them at 224x224",
    ]


def test_text_is_not_wrapped_in_a_wide_terminal_or_a_pipe(printed: Printed) -> None:
    assert printed(f"  {LONG}", columns=200) == f"  {LONG}\n"
    assert printed(f"  {LONG} {LONG} {LONG}", stream=io.StringIO) == f"  {LONG} {LONG} {LONG}\n"


def test_width_is_that_of_stderr_if_stdout_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    main, terminal = pty.openpty()
    with open(os.devnull, "w") as stdout, open(main, "rb"), open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "__stdout__", stdout)
        fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 61, 0, 0))
        assert columns_of(stderr) == 61


def test_line_of_the_terminals_width_is_not_wrapped() -> None:
    assert laid_out(Line("", "a " * 39 + "bc"), 80).count("\n") == 0
    assert laid_out(Line("", "a " * 39 + "bcd"), 80).count("\n") == 1


@pytest.mark.parametrize("columns", [40, 43, 50, 61, 80])
def test_paths_and_commands_are_not_broken(printed: Printed, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    typed = "/data/my models/dinov2 with registers.pth"
    monkeypatch.setattr(sys, "argv", ["streamconv", "convert", typed])
    path = "/data/a-long-folder-name/dinov2-with-registers-small-imagenet1k-1-layer/model.safetensors"
    copied = [typed, path, "`streamconv verify DIR SOURCE --device cpu`", "--select model.teacher.backbone"]
    copied += ["[1, 1370, 384]", "0.5 s", "1,160 MB/s", "streamconv plan --help"]
    text = printed(f"One, or two and three: {', or four and five: '.join(copied)}", columns=columns)
    for each in copied:
        assert each in text, text
    assert len(text.splitlines()) > 3
    assert "\0" not in text


@pytest.mark.parametrize("columns", [40, 57, 80])
def test_path_below_a_folder_of_the_user_is_not_broken(
    printed: Printed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, columns: int
) -> None:
    (tmp_path / "my models and data").mkdir()
    monkeypatch.chdir(tmp_path / "my models and data")
    monkeypatch.setenv("TORCH_HOME", "/home/someone with a name/and a folder that has a rather long name/torch")
    monkeypatch.setattr(sys, "argv", ["streamconv", "--report=a report of mine.html"])
    paths = [f"{os.environ['TORCH_HOME']}/hub/x.pth", f"{os.getcwd()}/x", "a report of mine.html"]
    text = printed(f"If you have x.pth, put it at {', or at '.join(paths)}", columns=columns)
    assert all(path in text for path in paths), text
    assert len(text.splitlines()) > 3


def test_error_lists_each_problem_with_a_hanging_indent(printed: Printed) -> None:
    problems = [f"missing: blocks.{i}.attn.qkv.weight, which {LONG}" for i in range(2)]
    error = MappingError(f"x.pth is not dinov2_vits14, and {LONG}:", problems)
    lines = click.unstyle(printed(*error_lines(error.summary, error.problems))).splitlines()
    assert lines[:5] == [
        "error: x.pth is not dinov2_vits14, and the saved image processor makes the",
        "       original's pixels, and both models compute the same from them at 224x224:",
        "  missing: blocks.0.attn.qkv.weight, which the saved image processor makes the",
        "    original's pixels, and both models compute the same from them at 224x224",
        "  missing: blocks.1.attn.qkv.weight, which the saved image processor makes the",
    ]
    assert printed(*error_lines(error.summary, error.problems), stream=io.StringIO) == f"error: {error}\n"
    assert printed(*error_lines("")) == "\x1b[31m\x1b[1merror: \x1b[0m\n"


@pytest.mark.parametrize(
    ("stream", "variables", "is_coloured"),
    [
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": "1"}, False),
        (Terminal, {"NO_COLOR": ""}, True),
        (Terminal, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        (io.StringIO, {}, False),
        (io.StringIO, {"FORCE_COLOR": "1"}, True),
    ],
)
def test_colours_are_for_terminals_unless_the_user_decides(
    printed: Printed, monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], variables: dict[str, str],
    is_coloured: bool,
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = printed(Line("Looks ok!", "", colour="green"), stream=stream)
    assert text == ("\x1b[32mLooks ok!\x1b[0m\n" if is_coloured else "Looks ok!\n")


def test_indentation_is_kept() -> None:
    assert indented("  a  b") == Line("  ", "a  b", 4)
    assert laid_out(indented(""), 80) == ""
    assert laid_out(indented("   a  b"), 80) == "   a  b"


def test_lines_that_differ_only_in_block_numbers_are_printed_once() -> None:
    chunked = [f"missing: blocks.{i // 2}.{i}.norm1.bias [4]" for i in range(4)]
    others = ["missing: blocks.1.norm2.bias [4]", "missing: norm.bias [4]", "missing: blocks.2.norm2.bias [4]"]
    assert [*folded([others[0], *chunked, *others[1:]])] == [
        others[0], others[2], "missing: blocks.*.*.norm1.bias [4] (4 tensors)", others[1],
        "(* stands for the blocks' numbers; --json lists each tensor)",
    ]  # fmt: skip
    assert [*folded(others)] == [others[0], others[2], others[1]]
    printed = error_lines("It does not fit:", chunked)
    assert [line.text.strip() for line in printed][1:] == [
        "missing: blocks.*.*.norm1.bias [4] (4 tensors)",
        "(* stands for the blocks' numbers; --json lists each tensor)",
    ]


def test_first_twenty_problems_are_listed_and_the_rest_is_counted() -> None:
    problems = [f"unexpected: {'abc'[i % 3]}{i}" for i in range(5_000)]
    error = MappingError("It does not fit:", problems)
    assert (error.problems, error.problem_count) == (tuple(problems[:1_000]), 5_000)
    assert str(error).splitlines()[-2:] == [f"  {problems[19]}", "  … and 4,980 more"]
    lines = [line.text.strip() for line in error_lines(error.summary, error.problems, error.problem_count)]
    assert lines[1:] == [*problems[:20], "… and 4,980 more; --json lists the first 1,000"]
    lines = [line.text.strip() for line in error_lines("It does not fit:", problems[:21])]
    assert lines[-1] == "… and 1 more; --json lists them"
    chunked = [f"missing: blocks.{i}.{part}" for part in range(30) for i in range(3)]
    assert [*folded(chunked)][19:] == [
        "missing: blocks.*.19 (3 tensors)", "… and 30 more; --json lists them",
        "(* stands for the blocks' numbers; --json lists each tensor)",
    ]  # fmt: skip


def test_long_problem_is_shortened() -> None:
    error = MappingError("It does not fit:", ["x" * 2_000])
    assert error.problems == ("x" * 499 + "…",)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (9_949, "9.9 kB"), (9_950, "10 kB"), (999_499, "999 kB"),
     (999_500, "1.0 MB"), (88_249_960, "88 MB"), (4_546_000_000, "4.5 GB"), (5e12, "5.0 TB"), (5e15, "5,000 TB")],
)  # fmt: skip
def test_sizes_are_in_units_that_a_person_reads(count: float, text: str) -> None:
    assert units.size(count) == text


def test_speeds_and_times_are_in_units_that_a_person_reads() -> None:
    assert [units.speed(4.5e9, 3.9), units.speed(12e6, 10), units.speed(0, 0)] == ["1,154 MB/s", "1.2 MB/s", "0.0 MB/s"]
    times = {0.04: "0.0 s", 3.94: "3.9 s", 59.96: "1 min 0 s", 3599: "59 min 59 s", 7265: "2 h 1 min"}
    assert [units.duration(seconds) for seconds in times] == [*times.values()]
