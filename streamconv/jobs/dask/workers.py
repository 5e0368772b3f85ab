"""The workers of a Dask cluster that can write an output: those with this version that reach its files.

A worker without the package must not be sent a task: it cannot unpickle the message, and Dask then gives up on the
worker. So each worker is inspected first, by a call that returns an error from such a worker. The plan is sent once to
each usable worker.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from streamconv._version import __version__
from streamconv.display import first_lines, printable
from streamconv.errors import SHOWN_PROBLEMS, OutputError, UsageError
from streamconv.files.address import Location
from streamconv.files.inline import is_inline
from streamconv.jobs.dask.task import inspect_worker
from streamconv.logs import logger
from streamconv.output.files import as_output_error
from streamconv.output.planned import PlannedConversion
from streamconv.progress import Progress

if TYPE_CHECKING:
    from distributed import Client, Future

_log = logger(__name__)

UPDATE_SECONDS = 1.0
WAIT_SECONDS = 300.0  # for a worker, if there is none


class UsableWorkers:
    """The usable workers of a cluster. ``plans`` are the copies of the plan that were sent to them, by address."""

    def __init__(self, client: "Client", planned: PlannedConversion, output: Location):
        self.plans: dict[str, Future] = {}
        self._client, self._planned, self._output = client, planned, output
        self._limits: dict[str, int] = {}  # files at once
        self._unusable: dict[str, str] = {}
        self._updated_at = self._seen_at = float("-inf")

    def wait(self, progress: Progress) -> None:
        """Wait for the first workers, and inspect them.

        Raises:
            UsageError: one of them cannot be used.
            OutputError: none joins in time, or the scheduler is lost.
        """
        self._seen_at = time.monotonic()
        while True:
            self.update()
            if self._unusable:
                problems = [f"{worker}: {reason}" for worker, reason in self._unusable.items()]
                raise UsageError(
                    f"{len(problems)} of {len(problems) + len(self.plans)} Dask workers cannot be used. Each needs "
                    f"streamconv {__version__} and the same files under the same paths. "
                    f"{'; '.join(first_lines(problems, SHOWN_PROBLEMS, len(problems)))}"
                )
            if self.plans:
                return
            progress(f"waiting for a worker of {self._client.scheduler.address}", 0, 1, "steps")
            time.sleep(UPDATE_SECONDS / 5)

    def update(self) -> None:
        """Find out which workers have joined or are gone, at most once in `UPDATE_SECONDS`."""
        now = time.monotonic()
        if now - self._updated_at < UPDATE_SECONDS:
            return
        present = self._present()
        # A plan is lost if all workers that hold it are lost at the same time, or if the cluster is restarted.
        self.plans = {w: plan for w, plan in self.plans.items() if w in present and plan.status == "finished"}
        if new := present - self.plans.keys() - self._unusable.keys():
            self._inspect(new)
        self._updated_at = time.monotonic()
        if self.plans:
            self._seen_at = self._updated_at
        elif now - self._seen_at > WAIT_SECONDS:
            others = f"; {len(self._unusable)} cannot be used" if self._unusable else ""
            raise OutputError(
                f"The Dask scheduler at {self._client.scheduler.address} has had no worker for {WAIT_SECONDS:g} s"
                f"{others}. Start workers with `dask worker`, and run the same command again."
            )

    def forget(self, worker: str) -> None:
        """Give no task to a worker that has lost one, until `update` finds the worker again."""
        self.plans.pop(worker, None)

    def free(self, busy: Mapping[str, int]) -> Iterator[str]:
        """Yield the workers that may write another file, those with the fewest first, until each has its limit.

        Args:
            busy: How many files each worker writes; the caller adds what it starts.
        """
        while able := [worker for worker in self.plans if busy.get(worker, 0) < self._limits[worker]]:
            yield min(able, key=lambda worker: busy.get(worker, 0))

    def require_scheduler(self) -> None:
        """Check that the client is still connected.

        Raises:
            OutputError
        """
        if self._client.status != "running":
            raise OutputError(
                f"The connection to the Dask scheduler at {self._client.scheduler.address} was lost. Run the same "
                "command again to resume."
            )

    def _present(self) -> set[str]:
        self.require_scheduler()
        try:
            return set(self._client.nthreads())
        except OSError:
            self.require_scheduler()
            raise

    def _inspect(self, new: Iterable[str]) -> None:
        sources = {
            str(file.location): file.size
            for file in self._planned.plan.sources()
            if isinstance(file.location, Path) and not is_inline(file)
        }
        with _temporary_file(self._output) as (folder, token):
            found = self._client.run(inspect_worker, sources, folder, token, workers=[*new], on_error="return")
        usable = {}
        for worker, report in found.items():
            if isinstance(report, OSError):  # it is gone
                continue
            if reason := _problem(report):
                self._unusable[worker] = reason
                if self.plans:  # otherwise, it becomes an error: see `wait`
                    _log.warning("the Dask worker %s is not used: %s", worker, reason)
            else:
                usable[worker] = report[1]
        if usable:
            with suppress(KeyError, OSError, TimeoutError):  # one of them is gone; the others are inspected again
                plan = self._client.scatter(self._planned, workers=[*usable], broadcast=True, hash=False)
                self.plans |= dict.fromkeys(usable, plan)
                self._limits |= usable


def _problem(report: Any) -> str:
    """Return why a worker cannot be used; "" if it can."""
    if isinstance(report, BaseException):
        return f"streamconv {__version__} cannot be imported there: {printable(str(report))}"
    version, _, problems = report
    if version != __version__:
        return f"it has streamconv {printable(version)}"
    return printable("; ".join(problems))


@contextmanager
def _temporary_file(output: Location) -> Iterator[tuple[str, str]]:
    """Create a file in the output, by which a worker finds out whether it sees the same folder; yield both names."""
    if not isinstance(output, Path):
        yield "", ""
        return
    path = output / f".streamconv-{token_hex(8)}"
    with as_output_error(path):
        path.touch(exist_ok=False)
    try:
        yield str(output), path.name
    finally:
        with suppress(OSError):
            os.unlink(path)
