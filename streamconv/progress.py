"""Progress on stderr: a bar where a person looks on, a quiet line now and then where a log does."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called with what is being done, how much of it is done, how much there is, and the unit: "bytes" or "steps"."""


def ignore_progress(what: str, done: int, total: int, unit: str) -> None:
    """For callers who want no reports."""
