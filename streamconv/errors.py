"""Every error that streamconv raises on purpose, as one tree.

Each message says what is wrong, where, and the mend. ``exit_code`` is what the command line
exits with; 1 is kept for a verification that found a difference, which is a result and no error.
"""

from collections.abc import Iterable


class StreamconvError(Exception):
    """Base of all. ``exit_code`` is the command line's exit code."""

    exit_code = 2


class UsageError(StreamconvError):
    """What was asked for does not exist: an unknown model, device, size or label file."""


class SourceError(StreamconvError):
    """The source cannot be read, or is not what it should be."""

    exit_code = 3


class SourceMissingError(SourceError):
    """There is no file where the source was looked for."""


class NotACheckpointError(SourceError):
    """The file is in no format that streamconv reads."""


class TruncatedError(SourceError):
    """The file ends before its contents do: a download that was cut short."""


class UnsafePickleError(SourceError):
    """The checkpoint's pickle asks for code to run. It was not run."""


class CorruptError(SourceError):
    """Bytes of the source do not match its own description or checksums."""


class ChangedError(CorruptError):
    """The source was changed while it was read."""


class NetworkError(SourceError):
    """The line to the source broke, and no attempt mended it."""


class NoRangesError(SourceError):
    """The server sends only whole files, and parts of one are needed."""


class MappingError(SourceError):
    """Tensors are missing, unexpected or misshaped. ``problems`` lists every one."""

    def __init__(self, summary: str, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("\n  ".join([summary, *self.problems]))


class OutputError(StreamconvError):
    """The output cannot be written where it was asked for."""

    exit_code = 4


class HubError(OutputError):
    """The Hub cannot be reached, or does not take what was sent. ``said`` is its own word, without the token."""

    def __init__(self, message: str, said: str = ""):
        self.said = said
        super().__init__(message)


class MissingUploadError(HubError):
    """The Hub lacks a file that an earlier process had sent, one of ``names``. Send them again."""

    def __init__(self, message: str, said: str, names: Iterable[str]):
        self.names = tuple(names)
        super().__init__(message, said)


def printable(text: str) -> str:
    """``text`` as a message can hold it: nothing that a terminal obeys, and not too long."""
    text = text if len(text) <= 80 else f"{text[:77]}…"
    return text if text.isprintable() else text.encode("unicode_escape").decode()
