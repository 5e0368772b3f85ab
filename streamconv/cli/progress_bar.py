"""Progress on stderr: a bar in a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import Any

LOG_INTERVAL_SECONDS = 10.0  # between two log lines about the same step


class ProgressReport:
    """A `streamconv.progress.Progress` that prints, unless it is quiet. Use it in a ``with`` statement."""

    def __init__(self, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._step, self._logged_at, self._logged_done = "", 0.0, 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "ProgressReport":
        if sys.stderr.isatty() and not self._is_quiet:
            self._bar = _bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def clear(self) -> None:
        """Remove the bar from the terminal, so that lines can be printed; the next call shows it again."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task, self._step = _bar(), None, ""

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        if self._is_quiet:
            return
        is_new, self._step = step != self._step, step
        if self._bar is not None:
            self._bar.start()
            if is_new:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(step, amount="")
            speed = self._bar.tasks[0].speed
            rate = f"  {speed / 1e6:,.0f} MB/s" if unit == "bytes" and speed else ""
            amount = _amount(done, total, unit) + rate if total > 1 else ""  # a single step shows an indeterminate bar
            self._bar.update(self._task, completed=done, total=total if total > 1 else None, amount=amount)
        elif is_new:
            self._logged_at, self._logged_done = time.monotonic(), done
            print(step, file=sys.stderr, flush=True)
        elif (seconds := time.monotonic() - self._logged_at) >= LOG_INTERVAL_SECONDS:
            rate = f", {(done - self._logged_done) / seconds / 1e6:,.1f} MB/s" if unit == "bytes" else ""
            self._logged_at, self._logged_done = time.monotonic(), done
            print(f"{step}: {_amount(done, total, unit)}{rate}", file=sys.stderr, flush=True)


def _amount(done: int, total: int, unit: str) -> str:
    return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB" if unit == "bytes" else f"{done}/{total} {unit}"


def _bar() -> Any:
    """Return rich's progress bar. Importing rich costs 3 MB and 60 ms, which only a terminal should pay."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
