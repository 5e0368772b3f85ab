"""Runs two parts of a job at the same time: one in this process, and one that waits for another process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

from streamconv.errors import Cancelled
from streamconv.progress import Progress, ProgressUnit

A = TypeVar("A")
B = TypeVar("B")
REPORT_SECONDS = 0.1


def beside(here: Callable[[Progress], A], elsewhere: Callable[[Progress], B], progress: Progress) -> tuple[A, B]:
    """Run ``here`` in a thread of its own and ``elsewhere`` in the caller's, and return both results.

    ``progress`` is called in the caller's thread only: with the reports of ``elsewhere`` and, once that has ended, with
    those of ``here``. An exception of one of the three ends both parts.
    """
    is_stopped = Event()
    last: tuple[str, int, int, ProgressUnit] | None = None

    def note(step: str, done: int, total: int, unit: ProgressUnit, /) -> None:
        nonlocal last
        if is_stopped.is_set():
            raise Cancelled
        last = step, done, total, unit

    def watch(step: str, done: int, total: int, unit: ProgressUnit, /) -> None:
        if running.done():
            running.result()  # raises its exception
        progress(step, done, total, unit)

    with ThreadPoolExecutor(1, thread_name_prefix="beside") as pool:
        running = pool.submit(here, note)
        try:
            other = elsewhere(watch)
            while not wait([running], REPORT_SECONDS).done:
                if last is not None:
                    progress(*last)
            return running.result(), other
        finally:
            is_stopped.set()
