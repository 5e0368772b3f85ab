"""Prints the results of the command line, its JSON, and error messages with their exit codes."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from streamconv.cli.bugs import InternalError
from streamconv.cli.layout import Line, error_lines, print_unwrapped, print_wrapped
from streamconv.errors import MappingError, OutputError, StreamconvError


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
        summary = error.summary if isinstance(error, (MappingError, InternalError)) else str(error)
        print_wrapped(error_lines(summary, problems, count), sys.stderr)
        if isinstance(error, InternalError):
            print_unwrapped(error.report, sys.stderr)
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
    """Print JSON or a shell script on stdout; errors as for `print_lines`."""
    _print(lambda: print_unwrapped(text.splitlines(), sys.stdout))


def _print(write: Callable[[], None]) -> None:
    try:
        with stdout_may_be_closed():
            write()
            sys.stdout.flush()
    except OSError as error:
        _discard_stdout()
        raise OutputError(f"The result cannot be printed: {error.strerror}.") from error


@contextmanager
def stdout_may_be_closed() -> Iterator[None]:
    """Ignore a pipe that its reader has closed, as in ``… | head``: the command keeps its own exit code."""
    try:
        yield
    except BrokenPipeError:
        _discard_stdout()


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # receives the rest of the buffer
