"""The errors that streamconv raises, as one tree.

Each message names what is wrong, where, and how to fix it. ``exit_code`` is the exit code of the command line; 1 is
reserved for a verification that found a difference, which is a result rather than an error.

All errors can be copied and pickled with their attributes, so that they cross from a worker process to its pool.
"""

import copyreg
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class StreamconvError(Exception):
    """Base class of all errors. ``exit_code`` is the exit code of the command line."""

    exit_code = 2

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception's own __reduce__ calls the class with ``args``, the message, which is not every class's argument.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class UsageError(StreamconvError):
    """A wrong argument: an unknown model, device or size, or a missing label file."""


class SourceError(StreamconvError):
    """The source cannot be read, or is not a checkpoint that can be converted.

    ``location`` is the `Location` of the file that the error is about, if it is about one.
    """

    exit_code = 3
    location: object = None


@contextmanager
def located(location: object) -> Iterator[None]:
    """Set the location of a source error that the block raises, unless it has one."""
    try:
        yield
    except SourceError as error:
        if error.location is None:
            error.location = location
        raise


class SourceMissingError(SourceError):
    """The source does not exist."""


class NotACheckpointError(SourceError):
    """The file is not in a format that streamconv reads."""


class TruncatedError(SourceError):
    """The file is incomplete, like a download that was cut short."""


class UnsafePickleError(SourceError):
    """The checkpoint's pickle refers to code. The code was not run."""


class CorruptError(SourceError):
    """The source is damaged: its bytes contradict its index or its checksums."""


class ChangedError(CorruptError):
    """The source was changed after it was opened."""


class NetworkError(SourceError):
    """The connection to the source broke, and all retries failed."""


class NoRangesError(SourceError):
    """The server sends only whole files, but parts of one are needed."""


class MappingError(SourceError):
    """Tensors are missing, unexpected or misshaped. ``problems`` lists every one."""

    def __init__(self, summary: str, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("\n  ".join([summary, *self.problems]))


class OutputError(StreamconvError):
    """The output cannot be written to the given place."""

    exit_code = 4


class HubError(OutputError):
    """The Hub cannot be reached, or refuses a request. ``server_message`` is its own message, without the token."""

    def __init__(self, message: str, server_message: str = ""):
        self.server_message = server_message
        super().__init__(message)


class MissingUploadError(HubError):
    """The Hub lacks a file that an earlier process had uploaded, one of ``names``. They must be uploaded again."""

    def __init__(self, message: str, server_message: str, names: Iterable[str]):
        self.names = tuple(names)
        super().__init__(message, server_message)


class Cancelled(StreamconvError):
    """Raise this in a callback (``progress`` or ``on_result``) to end a job as cancelled.

    It reaches the caller of the job as the very same exception; it is never wrapped, retried or taken for a failed
    check, and neither is any other exception of a callback. Files are complete or absent afterwards, and the same call
    resumes.

    To cancel from another thread, or from asyncio, let the callback check an event. Cancelling the task alone would
    only stop waiting for the thread:

    >>> stop = threading.Event()  # doctest: +SKIP
    >>> def check(step, done, total, unit):
    ...     if stop.is_set():
    ...         raise streamconv.Cancelled
    >>> task = asyncio.create_task(  # doctest: +SKIP
    ...     asyncio.to_thread(streamconv.convert, "x.pth", "folder", progress=check)
    ... )
    >>> stop.set()  # doctest: +SKIP
    >>> await task  # doctest: +SKIP
    Traceback (most recent call last):
    streamconv.errors.Cancelled: The job was cancelled.
    """

    exit_code = 130  # as for Ctrl-C

    def __init__(self, message: str = "The job was cancelled."):
        super().__init__(message)


def printable(text: str) -> str:
    """Return ``text`` for use in a message: shortened to 80 characters, without control characters."""
    text = text if len(text) <= 80 else f"{text[:77]}…"
    return text if text.isprintable() else text.encode("unicode_escape").decode()
