"""The command line's terminal: output streams, signals, error messages and exit codes.

A conversion must not fail because its terminal was closed or its output is no longer read. An interrupted
conversion must print the command that resumes it.
"""

import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, TextIO

from streamconv.cli.grace import end_after_signals
from streamconv.cli.layout import Line, error_lines, print_unwrapped, print_wrapped
from streamconv.errors import MappingError, OutputError, StreamconvError
from streamconv.redaction import shown_argument


class InterruptedByUser(BaseException):
    """Raised for Ctrl-C, SIGTERM and a closed terminal.

    It is not a KeyboardInterrupt, because click exits on that one without a message.
    """

    was_raised = False
    is_reported = False


def _raise_interrupted(number: int, frame: object) -> NoReturn:
    InterruptedByUser.was_raised = True
    raise InterruptedByUser


class _IgnoreBrokenPipe(io.TextIOBase):
    """stderr that ignores write errors: progress that cannot be shown must not end the job."""

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
    """Run a command. If it is interrupted, print how to resume it and exit with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # print names that the terminal cannot show
    # If the user closed stdout or stderr, os.devnull takes its file descriptor, so that no file of ours gets it.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    sys.stderr = _IgnoreBrokenPipe(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
    signals = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    for number in signals:  # signals that nohup or a shell script ignores stay ignored
        signal.signal(number, _raise_interrupted)
    end_after_signals(signals, _print_how_to_resume)
    try:
        command()
    except BaseException as error:
        # A library may catch the interruption, for instance while it imports torch, and raise an error of its own.
        if not InterruptedByUser.was_raised or (isinstance(error, SystemExit) and not error.code):
            raise
        _print_how_to_resume()
        sys.exit(130)
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)


def shown_command(arguments: list[str]) -> str:
    """Return the command line without the parts of URLs that may be secret: users, passwords, queries."""
    return shlex.join(["streamconv", *map(shown_argument, arguments)])


def _print_how_to_resume() -> None:
    if InterruptedByUser.is_reported:
        return
    InterruptedByUser.is_reported = True
    print_unwrapped(["Interrupted. To resume, run", f"  {_command_to_resume(sys.argv[1:])}"], sys.stderr)


def _command_to_resume(arguments: list[str]) -> str:
    shown = shown_command(arguments)
    is_whole = shown == shlex.join(["streamconv", *arguments])
    return shown if is_whole else f"{shown}  (with the full URLs; parts that may be secret are not shown here)"


@dataclass
class Printer:
    """Prints a command's output on stdout: text or, with --json, one JSON document, which also holds errors.

    ``results`` holds the results that are complete. If an error follows, the document contains both.
    """

    as_json: bool = False
    is_quiet: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    _has_printed: bool = False

    def show(self, result: Mapping[str, Any], lines: Iterable[str | Line], *, is_failure: bool = False) -> None:
        """Print a result as JSON, or as text unless --quiet was given. A failure is always printed."""
        if self.as_json:
            self._has_printed = True
            print_script(json.dumps(result, indent=2))
        elif is_failure or not self.is_quiet:
            print_lines(lines)

    def fail(self, error: StreamconvError) -> NoReturn:
        """Print an error, and end the process with its exit code."""
        problems, count = (error.problems, error.problem_count) if isinstance(error, MappingError) else ((), 0)
        summary = error.summary if isinstance(error, MappingError) else str(error)
        print_wrapped(error_lines(summary, problems, count), sys.stderr)
        self.show_error_as_json(type(error).__name__, str(error), error.exit_code, problems, count)
        sys.exit(error.exit_code)

    def show_error_as_json(
        self, kind: str, message: str, exit_code: int, problems: Iterable[str] = (), problem_count: int = 0
    ) -> None:
        """With --json, print the document with the error in it, unless a document was already printed."""
        if not self.as_json or self._has_printed:
            return
        error: dict[str, Any] = {"type": kind, "message": message, "exit_code": exit_code}
        if problem_count:
            error |= {"problems": list(problems), "problem_count": problem_count}
        with suppress(OutputError):  # stdout cannot be written; stderr has the error
            self.show({**self.results, "error": error}, [])


def print_lines(lines: Iterable[str | Line]) -> None:
    """Print a result on stdout. A failed write is an error, but a pipe closed by its reader is not.

    Raises:
        OutputError: stdout cannot be written.
    """
    _print(lambda: print_wrapped(lines, sys.stdout))


def print_script(text: str) -> None:
    """Print JSON or a shell's script on stdout; errors as for `print_lines`."""
    _print(lambda: print_unwrapped(text.splitlines(), sys.stdout))


def _print(write: Callable[[], None]) -> None:
    try:
        write()
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # receives the rest of the buffer
        if not isinstance(error, BrokenPipeError):  # `… | head` has read enough: keep the command's own exit code
            raise OutputError(f"The result cannot be printed: {error.strerror}.") from error
