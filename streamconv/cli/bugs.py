"""Turns unexpected exceptions into errors with an exit code: a shortage of memory, files or disk space, or a bug."""

import errno
import os
import platform
import re
import sys
import traceback
from collections.abc import Sequence
from threading import Thread

from streamconv._version import __version__
from streamconv.cli.shown import shown_command
from streamconv.display import shortened, visible
from streamconv.errors import LIMIT_ERRORS, OutputError, StreamconvError, UsageError
from streamconv.redaction import redacted

MAX_LINES, MAX_LINE_LENGTH = 100, 500  # of a traceback
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})


class InternalError(StreamconvError):
    """A bug in streamconv. ``report`` holds the lines to send to its maintainers.

    The exit code is EX_SOFTWARE of sysexits.h. Python's own, 1, would mean that verification found a difference.
    """

    exit_code = 70

    def __init__(self, report: Sequence[str]):
        self.summary = "This is a bug in streamconv. Please report it to its maintainers, with the lines below:"
        self.report = tuple(report)
        super().__init__(self.summary)

    def __str__(self) -> str:
        return "\n".join(map(visible, (self.summary, *self.report)))


def to_our_error(error: Exception, words: Sequence[str]) -> StreamconvError:
    """Return the error to show for an exception that ended a command with the arguments ``words``."""
    if isinstance(error, StreamconvError):
        return error
    if isinstance(error, ImportError) and not (error.name or "streamconv").startswith("streamconv"):
        package = str(error.name).partition(".")[0]
        if isinstance(error, ModuleNotFoundError):  # a conversion needs only a few packages
            return UsageError(
                f"This needs the Python package {package}, which is not installed. Run `pip install {package}`."
            )
        return UsageError(f"The Python package {package} cannot be imported: {error}. Reinstall it.")
    if isinstance(error, MemoryError):
        return UsageError("There is too little memory. Close other programs, or raise the limit (`ulimit -v`).")
    if _could_not_start_thread(error):
        return UsageError("No more threads can be started. End other programs, or raise a limit (`ulimit -u`, `-v`).")
    if isinstance(error, OSError) and error.errno in LIMIT_ERRORS:
        return UsageError(f"A system limit was reached: {error.strerror}. End other programs, or raise the limit.")
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return OutputError(f"{where}{error.strerror}. Make sure that the disk works, and run the same command again.")
    return InternalError(_report(error, words))


def _could_not_start_thread(error: Exception) -> bool:
    # Python raises a plain RuntimeError, so the place decides, not the message.
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return type(error) is RuntimeError and bool(frames) and frames[-1].f_code is Thread.start.__code__


def _report(error: Exception, words: Sequence[str]) -> list[str]:
    """Return the lines of a bug report, without secrets: the command, the versions and the traceback."""
    # Very long words are left out, not cut: what is left of a URL could show a password.
    text = re.sub(rf"\S{{{MAX_LINE_LENGTH},}}", "…", "".join(traceback.format_exception(error)))
    lines = [line for line in text.splitlines() if line.strip(" ~^")]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES // 2], "…", *lines[-MAX_LINES // 2 :]]
    version = f"streamconv {__version__}, Python {platform.python_version()}, {sys.platform} {os.uname().release}"
    return [shortened(shown_command([*words]), MAX_LINE_LENGTH), version, *map(_shown, lines)]


def _shown(line: str) -> str:
    """Return a line of a traceback without secrets, cut at a space if it is too long."""
    return redacted(line if len(line) <= MAX_LINE_LENGTH else f"{line[:MAX_LINE_LENGTH].rpartition(' ')[0]} …")
