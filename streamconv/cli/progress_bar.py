"""Progress on stderr: a bar in a terminal, an occasional line in a log.

The bar is click's, which takes 6 ms and 0.8 MB to import and draw. tqdm's takes 73 ms and 5.7 MB, because it imports
importlib.metadata, and rich's 81 ms and 3.6 MB (best of five on two busy cores).
"""

import logging
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import click

from streamconv.cli.layout import columns_of, print_wrapped
from streamconv.cli.units import size, speed
from streamconv.display import visible

DRAW_INTERVAL_SECONDS = 0.1
LOG_INTERVAL_SECONDS = 10.0  # between two log lines about the same step
MIN_BAR_COLUMNS = 6
FREE_COLUMNS = 4 + 3  # between the parts of the line, and for the ^C that a terminal shows at its end
REMOVE_BAR = "\r\033[K\033[?25h"  # click would keep the bar; this also shows the cursor, which click hides
_log = logging.getLogger("streamconv")


class ProgressReport:
    """A `streamconv.progress.Progress` that prints progress unless it is quiet. Use it in a ``with`` statement."""

    def __init__(self, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._step, self._started_at, self._started_with, self._printed_at = "", 0.0, 0, 0.0
        self._is_terminal = False
        self._bar: Any = None

    def __enter__(self) -> "ProgressReport":
        self._is_terminal = sys.stderr.isatty()
        for handler in _log.handlers:
            handler.addFilter(self._make_room)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler in _log.handlers:
            handler.removeFilter(self._make_room)
        self.clear()

    def clear(self) -> None:
        """Remove the bar from the terminal, so that lines can be printed; the next call shows it again."""
        if self._bar is not None:
            print(REMOVE_BAR, end="", file=sys.stderr, flush=True)

    def _make_room(self, record: logging.LogRecord) -> bool:
        """Remove the bar before a log line: handlers call their filters first."""
        self.clear()
        return True

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        if self._is_quiet:
            return
        now, is_new = time.monotonic(), step != self._step
        if is_new:
            self.clear()
            self._step, self._started_at, self._started_with = step, now, done
            self._bar = _bar(total) if self._is_terminal else None
        elif now - self._printed_at < (DRAW_INTERVAL_SECONDS if self._is_terminal else LOG_INTERVAL_SECONDS):
            return
        self._printed_at = now
        amounts = self._amounts(done, total, unit, now - self._started_at)
        if self._bar is not None:
            _draw(self._bar, visible(step), done, "  ".join(amounts))
        else:
            print_wrapped([step if is_new else f"{step}: {', '.join(amounts)}"], sys.stderr)

    def _amounts(self, done: int, total: int, unit: str, seconds: float) -> list[str]:
        """Describe how much is done; for bytes, also the speed since the step started and the remaining time."""
        if total <= 1:
            return []
        if unit != "bytes":
            return [f"{done}/{total} {unit}"]
        unit = size(total).split()[1]
        new, amount = done - self._started_with, f"{size(done).removesuffix(f' {unit}')}/{size(total)}"
        if not new or not seconds:
            return [amount]
        return [amount, speed(new, seconds), str(timedelta(seconds=round((total - done) / new * seconds)))]


def _bar(total: int) -> Any:
    """Return a bar, whose width `_draw` sets. A single step is shown without one."""
    fill, empty = ("━", "─") if "utf" in (sys.stderr.encoding or "").lower() else ("#", "-")
    return click.progressbar(
        length=total,
        file=sys.stderr,
        fill_char=fill,
        empty_char=empty,
        bar_template="%(label)s  %(bar)s  %(info)s" if total > 1 else "%(label)s",
        show_eta=False,
        show_percent=False,
        item_show_func=lambda amounts: amounts,
    )


def _draw(bar: Any, step: str, done: int, amounts: str) -> None:
    columns = columns_of(sys.stderr) - FREE_COLUMNS - len(amounts)
    longest = max(columns - MIN_BAR_COLUMNS, 1)
    bar.label = step if len(step) <= longest else f"{step[: longest - 1]}…"
    bar.width = max(columns - len(bar.label), 0)
    bar.pos, bar.current_item = done, amounts
    bar.render_progress()
