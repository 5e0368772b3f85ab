"""Two parts of a job run at the same time, report in the caller's thread, and end together."""

import threading
import time

import pytest

from streamconv.errors import Cancelled
from streamconv.jobs.beside import beside
from streamconv.progress import Progress

SECONDS = 30  # to wait for what should happen at once


def forever(progress: Progress) -> None:
    """Report for as long as nothing ends it."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        progress("here", 1, 2, "bytes")
        time.sleep(0.001)
    raise AssertionError("nothing ended it")


def fail(progress: Progress) -> None:
    raise OSError("broken")


def test_both_results_are_returned_and_reports_arrive_in_the_callers_thread() -> None:
    met, caller, reports = threading.Barrier(2, timeout=SECONDS), threading.current_thread(), []

    def here(progress: Progress) -> int:
        met.wait()  # the other part runs, too
        progress("here", 1, 2, "bytes")
        met.wait()
        time.sleep(0.3)
        return 1

    def elsewhere(progress: Progress) -> int:
        assert threading.current_thread() is caller
        progress("elsewhere", 1, 1, "steps")
        met.wait()
        met.wait()
        return 2

    def progress(step: str, *rest: object) -> None:
        assert threading.current_thread() is caller
        reports.append(step)

    assert beside(here, elsewhere, progress) == (1, 2)
    assert reports[0] == "elsewhere"
    assert set(reports[1:]) == {"here"}


def test_failure_here_ends_what_runs_elsewhere() -> None:
    with pytest.raises(OSError, match="broken"):
        beside(fail, forever, lambda *report: None)


def test_failure_elsewhere_ends_what_runs_here() -> None:
    with pytest.raises(OSError, match="broken"):
        beside(forever, fail, lambda *report: None)


@pytest.mark.parametrize("step", ["elsewhere", "here"])
def test_exception_of_progress_ends_both(step: str) -> None:
    def cancel(name: str, *rest: object) -> None:
        if name == step:
            raise Cancelled

    with pytest.raises(Cancelled):
        beside(forever, lambda progress: progress("elsewhere", 1, 1, "steps"), cancel)
