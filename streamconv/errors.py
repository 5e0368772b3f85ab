"""The errors that streamconv raises, as one tree.

Each message says what is wrong, where, and how to fix it. ``exit_code`` is the exit code of the command line; 1 is
reserved for a verification that found a difference, which is a result rather than an error.

All errors can be copied and pickled with their attributes, so that a worker process can send them to its pool.
"""

import copyreg
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from streamconv.display import first_lines, shortened, visible

SHOWN_PROBLEMS = 20
KEPT_PROBLEMS = 1_000
PROBLEM_LENGTH = 500  # characters: two shapes and two names of ordinary length
# The errors of the system that mean that a limit on files, processes or memory was reached.
LIMIT_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})


class StreamconvError(Exception):
    """Base class of all errors. ``exit_code`` is the exit code of the command line.

    ``str(error)`` is safe to print and to log: text from files and servers in it is escaped (`display.visible`).
    """

    exit_code = 2

    def __str__(self) -> str:
        return visible(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception's own __reduce__ calls the class with ``args``, the message, which some classes do not take.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class UsageError(StreamconvError):
    """A wrong argument: an unknown model, device or size, or a missing label file."""


class SourceError(StreamconvError):
    """The source cannot be read, or is not a checkpoint that can be converted.

    ``location`` is the `Location` of the file that caused the error, if a file did.
    """

    exit_code = 3
    location: object = None


@contextmanager
def located(location: object) -> Iterator[None]:
    """Set the location of a source error that is raised in the block, unless the error has one already."""
    try:
        yield
    except SourceError as error:
        if error.location is None:
            error.location = location
        raise


class SourceMissingError(SourceError):
    """The source does not exist."""


class UnreadableError(SourceError):
    """The file exists, but cannot be read: permission is denied, its disk fails, or it is a folder.

    ``reason`` is the message without advice.
    """

    def __init__(self, reason: str, advice: str = ""):
        self.reason = reason
        super().__init__(f"{reason.removesuffix('.')}. {advice}".rstrip())


class RefusedError(SourceError):
    """The server refuses access to the file."""


class StoreReadError(SourceError):
    """A store does not give a file: it reports an error that is neither a refusal nor a missing file."""


class NotACheckpointError(SourceError):
    """The file is not in a format that streamconv reads."""


class TruncatedError(SourceError):
    """The file is incomplete, such as a download that was cut short."""


class UnsafePickleError(SourceError):
    """The checkpoint's pickle refers to code. The code was not run."""


class CorruptError(SourceError):
    """The source is damaged: its bytes do not match its index or its checksums."""


class ChangedError(CorruptError):
    """The source has changed since it was opened."""


class NetworkError(SourceError):
    """The source cannot be reached, or the connection to it broke, and all retries failed."""


class NoRangesError(SourceError):
    """The server sends only whole files, but parts of one are needed."""


class RepeatedDataError(SourceError):
    """The output would be much larger than the data that it is made from, which the user has not allowed.

    ``reason`` is the message without advice.
    """

    def __init__(self, reason: str, advice: str):
        self.reason = reason
        super().__init__(f"{reason}. {advice}")


class MappingError(SourceError):
    """Tensors are missing, unexpected or of the wrong shape.

    The message is ``summary`` and, on lines of their own, the first `SHOWN_PROBLEMS` of the problems.
    ``problems`` holds up to `KEPT_PROBLEMS` of them, each shortened to `PROBLEM_LENGTH` characters; ``problem_count``
    is their total number.

    Args:
        count: The total number of problems, if it is known: then only those that are kept are made.
    """

    def __init__(self, summary: str, problems: Iterable[str], count: int | None = None):
        rest = iter(problems)
        self.summary = summary
        self.problems = tuple(shortened(each, PROBLEM_LENGTH) for each in islice(rest, KEPT_PROBLEMS))
        self.problem_count = len(self.problems) + sum(1 for _ in rest) if count is None else count
        super().__init__(summary)

    def __str__(self) -> str:
        lines = [self.summary, *first_lines(self.problems, SHOWN_PROBLEMS, self.problem_count)]
        return "\n  ".join(map(visible, lines))


class OutputError(StreamconvError):
    """The output cannot be written."""

    exit_code = 4


class BusyError(OutputError):
    """Another process is writing the output, or this file of it."""


class HubError(OutputError):
    """The Hub cannot be reached, or refuses a request. ``server_message`` is the Hub's message, without the token."""

    def __init__(self, message: str, server_message: str = ""):
        self.server_message = server_message
        super().__init__(message)


class MissingUploadError(HubError):
    """The Hub lacks one of the files ``names``, which an earlier process had uploaded. All must be uploaded again."""

    def __init__(self, message: str, server_message: str, names: Iterable[str]):
        self.names = tuple(names)
        super().__init__(message, server_message)


class Cancelled(StreamconvError):
    """Raise this in a callback (``progress`` or ``on_result``) to end a job as cancelled.

    The caller of the job receives this very exception: it is never wrapped, retried or mistaken for a failed check. The
    same is true of any other exception that a callback raises. Afterwards, files are complete or absent, and the same
    call resumes.

    To cancel from another thread, or from asyncio, let the callback check an event. Cancelling only the asyncio task
    ends the waiting, but not the thread:

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
