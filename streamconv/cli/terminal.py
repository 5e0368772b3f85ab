"""What a process of the command line owes its terminal: streams, signals, lines, one message an error, an exit code."""

import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

import typer

from streamconv.errors import OutputError, StreamconvError
from streamconv.files.address import Address


class InterruptedByUser(BaseException):
    """Ctrl-C, SIGTERM, or a closed terminal. No KeyboardInterrupt, which typer ends without a word."""

    is_raised = False


def _interrupt(number: int, frame: object) -> NoReturn:
    InterruptedByUser.is_raised = True
    raise InterruptedByUser


class _IgnoreBrokenPipe(io.TextIOBase):
    """stderr, whether or not someone is there to read it: a job does not end for want of a listener."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.isatty, self.fileno = stream.isatty, stream.fileno  # type: ignore[method-assign]

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def run_with_signals(command: Callable[[], object]) -> None:
    """Run a command; where it is interrupted, say how to go on, and exit with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no error
    # What stands in for a closed stream takes its number, too, which must not become that of a file that we write.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    sys.stderr = _IgnoreBrokenPipe(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
    signals = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    for number in signals:  # nohup, and scripts for what they run in the background, have them ignored
        signal.signal(number, _interrupt)
    try:
        command()
    except BaseException as error:
        # What imports torch may catch the interruption, and end in an error of its own.
        if not InterruptedByUser.is_raised or (isinstance(error, SystemExit) and not error.code):
            raise
        print(f"interrupted. To go on, run\n  {_again(sys.argv[1:])}", file=sys.stderr)
        sys.exit(130)
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)


def _again(words: list[str]) -> str:
    """The command line, but for what may be secret of its addresses: users, passwords, queries."""
    shown = [
        re.sub(r"(?i)(?<![^\s=])[a-z][a-z0-9+.-]+://\S+", lambda found: str(Address(found[0])), word) for word in words
    ]
    hidden = "" if shown == words else "  (with the addresses in full; what may be secret of them is not shown)"
    return shlex.join(["streamconv", *shown]) + hidden


def print_lines(lines: Iterable[str]) -> None:
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        if not isinstance(error, BrokenPipeError):  # `… | head`: no one reads on, and the verdict is what it was
            fail(OutputError(f"The result cannot be printed: {error.strerror}."))


@contextmanager
def report_errors(before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Our own errors become one message and an exit code; all others are bugs, and show their traceback."""
    try:
        yield
    except StreamconvError as error:
        before()
        fail(error)


def fail(error: StreamconvError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(error.exit_code)


def print_json(value: dict[str, Any]) -> None:
    print_lines([json.dumps(value, indent=2)])
