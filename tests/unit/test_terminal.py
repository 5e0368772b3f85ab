"""Interruptions."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from streamconv.cli.commands import app
from streamconv.cli.layout import print_unwrapped
from streamconv.cli.shown import command_to_resume
from streamconv.cli.start import print_early


def test_interruption_shows_the_command_without_its_secrets() -> None:
    words = ["run", "https://me:word@h/x.pth?sig=word", "--image=http://me:word@h/y.png", "-o", "a b"]
    shown = command_to_resume(words)
    assert shown.startswith("streamconv run https://h/x.pth --image=http://h/y.png -o 'a b'  (with the full URLs")
    assert "word" not in shown
    assert command_to_resume(["run", "cache::https://me:word@h/x"]).startswith("streamconv run cache::https://h/x")
    assert command_to_resume(["run", "x.pth"]) == "streamconv run x.pth"


def test_interruption_shows_a_foreign_name_as_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`streamconv run *.pth` has names as arguments that the user did not type."""
    monkeypatch.setattr(sys, "argv", ["streamconv", "run", f"\x1b[2J\nLooks ok!\u202e{'x' * 3_000}.pth"])
    print_unwrapped(["Interrupted. To resume, run", f"  {command_to_resume(sys.argv[1:])}"], sys.stderr)
    expected = rf"  streamconv run $'\x1b[2J\x0aLooks ok!\xe2\x80\xae{'x' * 3_000}.pth'"
    assert capsys.readouterr().err == f"Interrupted. To resume, run\n{expected}\n"


NAMES = [
    "a b", "a'b", 'a"b', "$x", "`id`", "a\\b", "-x", "--", "é", "😀", "👩‍👩‍👧", "!x", "~", "*", "#x", "x" * 300, "",
    "a\nb", "\r",
    "\x1b[2J", "\udcff\udcfe", "a\u202eb'\\", "\u200bx", "\tx", "\xa0", "e" + "\u0301" * 9, "\x1b[2J" * 100,
    "\U0010ffff",
]  # fmt: skip


def test_command_to_resume_can_be_pasted_into_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    print_early([command_to_resume(NAMES)])
    (line,) = capsys.readouterr().err.splitlines()
    assert not {"\x1b", "\u202e", "\r"} & {*line}
    script = f"streamconv() {{ printf '%s\\0' \"$@\"; }}; {line}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]] == NAMES


def test_warnings_of_other_packages_are_shown_as_one_escaped_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streamconv.cli.commands.models.models_as_dict", lambda: warn() or {})

    def warn() -> None:
        warnings.warn("\x1b[2J\nLooks ok!\u202e", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        try:
            app(["models", "--json"], standalone_mode=False)
        finally:
            logging.captureWarnings(False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert r"UserWarning: \x1b[2J\nLooks ok!\u202e" in line
