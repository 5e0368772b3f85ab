"""The callback by which long operations report progress. Nothing here prints; the command line does."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called with the name of the operation, the amount done, the total, and their unit, "bytes" or "steps"."""


def ignore_progress(what: str, done: int, total: int, unit: str) -> None:
    """Ignore a report; the default of functions that report progress."""
