"""Progress on stderr: a bar where a person looks on, a quiet line now and then where a log does."""

import sys
import time
from types import TracebackType

QUIET_SECONDS = 10.0  # between the lines of a log


class ProgressReport:
    """Call it with what is being done and how far; use it in a ``with`` statement."""

    def __init__(self, unit: str):
        self._unit, self._what, self._last = unit, "", time.monotonic()
        self._bar = _bar(unit) if sys.stderr.isatty() else None
        self._task = None if self._bar is None else self._bar.add_task("", total=None)

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total)
        elif what != self._what or time.monotonic() - self._last >= QUIET_SECONDS:
            self._last = time.monotonic()
            print(f"{what}: {_amount(done, self._unit)} of {_amount(total, self._unit)}", file=sys.stderr, flush=True)
        self._what = what


def _amount(count: int, unit: str) -> str:
    return f"{count / 1e6:,.0f} MB" if unit == "bytes" else str(count)


def _bar(unit: str):  # type: ignore[no-untyped-def]
    """rich costs 3 MB and 60 ms: only a terminal pays for it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    amount = (DownloadColumn(), Speed()) if unit == "bytes" else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
