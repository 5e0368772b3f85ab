"""TODO cli.progress_bar"""

import sys
import time
from types import TracebackType
from typing import Any

QUIET_SECONDS = 10.0  # between the lines of a log


class ProgressReport:
    """Call it with what is being done, how far, of how much, in which unit; use it in a ``with`` statement."""

    def __init__(self) -> None:
        self._what, self._last, self._last_done = "", 0.0, 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "ProgressReport":
        if sys.stderr.isatty():
            self._bar = _bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def clear(self) -> None:
        """Take the bar off the terminal, for lines to be printed; the next call shows it again."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task, self._what = _bar(), None, ""

    def __call__(self, what: str, done: int, total: int, unit: str) -> None:
        is_new, self._what = what != self._what, what
        if self._bar is not None:
            self._bar.start()
            if is_new:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(what, amount="")
            speed = self._bar.tasks[0].speed
            rate = f"  {speed / 1e6:,.0f} MB/s" if unit == "bytes" and speed else ""
            amount = _amount(done, total, unit) + rate if total > 1 else ""  # one step: the bar only moves
            self._bar.update(self._task, completed=done, total=total if total > 1 else None, amount=amount)
        elif is_new:
            self._last, self._last_done = time.monotonic(), done
            print(what, file=sys.stderr, flush=True)
        elif (seconds := time.monotonic() - self._last) >= QUIET_SECONDS:
            rate = f", {(done - self._last_done) / seconds / 1e6:,.1f} MB/s" if unit == "bytes" else ""
            self._last, self._last_done = time.monotonic(), done
            print(f"{what}: {_amount(done, total, unit)}{rate}", file=sys.stderr, flush=True)


def _amount(done: int, total: int, unit: str) -> str:
    return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB" if unit == "bytes" else f"{done}/{total} {unit}"


def _bar() -> Any:
    """rich costs 3 MB and 60 ms: only a terminal pays for it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
