"""Starts the command line: handles signals and prepares the output streams before anything else is imported.

A conversion must not fail because its terminal was closed or its output is no longer read. An interrupted command must
print how to resume it, from its first moment on, so this module imports only what Python itself has imported.
"""

import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TextIO


class InterruptedByUser(BaseException):
    """Raised for Ctrl-C, SIGTERM and a closed terminal.

    It is not a KeyboardInterrupt, because click exits on that one without a message.
    """

    was_raised = False


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
    signals = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    try:
        for number in signals:  # signals that nohup or a shell script ignores stay ignored
            signal.signal(number, _raise_interrupted)
        _prepare_streams()
        command()
    except BaseException as error:
        _ignore(signals)  # what follows takes a moment
        # A library may catch the interruption, for instance while it imports torch, and raise an error of its own.
        if not InterruptedByUser.was_raised or (isinstance(error, SystemExit) and not error.code):
            raise
        from streamconv.cli.shown import command_to_resume
        from streamconv.display import visible

        command_line = command_to_resume(sys.argv[1:])
        print(f"Interrupted. To resume, run\n  {visible(command_line, len(command_line))}", file=sys.stderr)
        sys.exit(130)
    finally:
        _ignore(signals)


def _ignore(signals: list[signal.Signals]) -> None:
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def _prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # print names that the terminal cannot show
    # If the user closed stdin, stdout or stderr, os.devnull takes its descriptor, so that no file of ours gets it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    sys.stderr = _IgnoreBrokenPipe(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
