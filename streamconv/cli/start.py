"""Starts the command line: handles signals and prepares the output streams before anything else is imported.

A conversion must not fail because its terminal was closed or its output is no longer read. An interrupted command must
print how to resume it from the very start, so this module imports only modules that Python itself has imported.
"""

import io
import os
import signal
import sys
import time
from _thread import interrupt_main, start_new_thread
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn, TextIO

from streamconv.cli.grace import end_after_signals


class InterruptedByUser(BaseException):
    """Raised for Ctrl-C, SIGTERM and a closed terminal.

    It is not a KeyboardInterrupt, because click exits on that one without a message.
    """

    was_raised = False
    is_reported = False
    show_as_json: Callable[[], object] | None = None  # prints the JSON document of --json, once the options are known


def _raise_interrupted(number: int, frame: object) -> NoReturn:
    InterruptedByUser.was_raised = True
    raise InterruptedByUser(number)


def _interrupt_again(ignored: "sys.UnraisableHookArgs") -> None:
    """Repeat an interruption that Python has ignored, as it does in callbacks of the garbage collector."""

    def repeat() -> None:
        time.sleep(0.01)  # until the callback has ended
        interrupt_main(number)

    if isinstance(ignored.exc_value, InterruptedByUser):
        (number,) = ignored.exc_value.args
        start_new_thread(repeat, ())
    else:
        sys.__unraisablehook__(ignored)


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
    signals = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    try:
        for number in signals:  # signals that nohup or a shell script ignores stay ignored
            signal.signal(number, _raise_interrupted)
        sys.unraisablehook = _interrupt_again
        _prepare_streams()
        with suppress(RuntimeError):  # if no thread can be started, the command reports that
            end_after_signals(signals, _print_how_to_resume)
        command()
    except BaseException as error:
        _ignore(signals)  # a second one must not interrupt the message
        # A library may catch the interruption, for instance while it imports torch, and raise an error of its own.
        if not InterruptedByUser.was_raised or (isinstance(error, SystemExit) and not error.code):
            raise
        _print_how_to_resume()
        sys.exit(130)
    finally:
        _ignore(signals)


def _print_how_to_resume() -> None:
    from streamconv.cli.shown import command_to_resume

    if InterruptedByUser.is_reported:
        return
    InterruptedByUser.is_reported = True
    print_early(["Interrupted. To resume, run", f"  {command_to_resume(sys.argv[1:])}"])
    if InterruptedByUser.show_as_json is not None:
        InterruptedByUser.show_as_json()


def print_early(lines: Iterable[str]) -> None:
    """Print lines on stderr, unshortened, even if click cannot be imported."""
    try:
        from streamconv.display import visible

        shown = [visible(line, 10 * len(line) + 1) for line in lines]  # the longest escape has ten characters
    except (OSError, MemoryError):  # nothing can be imported any more
        shown = [ascii(line)[1:-1] for line in lines]
    print("\n".join(shown), file=sys.stderr)


def _ignore(signals: list[signal.Signals]) -> None:
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def _prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # print names that the terminal cannot show
    # If the user closed stdin, stdout or stderr, os.devnull takes its descriptor, so that no file of ours gets it.
    with suppress(FileNotFoundError):  # in a container without devices
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    sys.stderr = _IgnoreBrokenPipe(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
