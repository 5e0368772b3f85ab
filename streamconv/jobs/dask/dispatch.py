"""Writes the weight files of a plan on the workers of a Dask cluster, one file in each task.

Each task is given to one worker, and no worker has more tasks than it may run at once. So ten thousand files do not
flood the scheduler, and the file of a lost worker can be given to another one at once, which resumes it.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

from streamconv.errors import OutputError, UsageError
from streamconv.files.address import Location
from streamconv.jobs.dask.task import ENDED, write_file
from streamconv.jobs.dask.workers import UsableWorkers
from streamconv.logs import logger
from streamconv.output.manifest import WrittenFile
from streamconv.output.planned import PlannedConversion
from streamconv.planning.shards import Shard
from streamconv.progress import Progress

if TYPE_CHECKING:
    from distributed import Client, Future

_log = logger(__name__)

POLL_SECONDS = 0.1
RESULT_SECONDS = 10.0  # for a few bytes from a worker that has just ended a task
STOP_SECONDS = 3.0  # the command line ends 4 s after Ctrl-C
MAX_LOSSES = 4


def write_files_on(
    client: "Client", planned: PlannedConversion, output: Location, shards: Sequence[Shard], progress: Progress
) -> tuple[dict[str, WrittenFile], int]:
    """Write weight files, or the rest of them after an interruption, on the workers of a Dask cluster.

    If this raises, tasks that wait are dropped, and those that run stop within seconds. The same call resumes.

    Args:
        output: An output that has begun.
        progress: Called with the bytes of all files. The number never falls: if a file must be written again from an
            earlier point, it stays the same until that file has caught up.

    Returns:
        The files by name, and how many of their bytes interrupted processes had written.

    Raises:
        UsageError: the client is asynchronous, or a worker has another version of streamconv or cannot reach the
            files.
        SourceError, OutputError: as in one process; or the scheduler or all workers are lost, or a file is given up.
    """
    if client.asynchronous:
        raise UsageError("An asynchronous Dask client cannot be used. Give one with asynchronous=False.")
    if isinstance(output, Path):
        output = Path(os.path.abspath(output))  # workers have other current folders
    workers = UsableWorkers(client, planned, output)
    workers.wait(progress)
    with _Tasks(client, workers, output, shards) as tasks:
        return tasks.run(progress)


@dataclass(frozen=True)
class _Task:
    shard: Shard
    worker: str
    attempt: int


@dataclass(frozen=True)
class _Losses:
    """How many workers in a row were lost with a file while it did not get beyond a position."""

    count: int = 0
    position: int = 0


class _Reports:
    """What the tasks report: the furthest position in each file, and which attempts run.

    The client's thread calls `receive`. The client keeps a reference to that method even after it has unsubscribed, so
    this object refers to nothing large, and to nothing that the cluster keeps for us.
    """

    def __init__(self) -> None:
        self.positions: dict[str, int] = {}
        self.running: set[tuple[str, int]] = set()
        self._has_report = Event()

    def receive(self, event: tuple[float, tuple[str, int, int]]) -> None:
        filename, attempt, position = event[1]
        if position == ENDED:
            self.running.discard((filename, attempt))
        else:
            self.running.add((filename, attempt))
            self.positions[filename] = max(position, self.positions.get(filename, 0))
        self._has_report.set()

    def wait(self) -> None:
        """Wait until a task reports something, at most `POLL_SECONDS`."""
        self._has_report.wait(POLL_SECONDS)
        self._has_report.clear()


class _Tasks:
    """The weight files to write, and the tasks that write them."""

    def __init__(self, client: "Client", workers: UsableWorkers, output: Location, shards: Sequence[Shard]):
        self._client, self._workers, self._output, self._shards = client, workers, output, shards
        self._topic = f"streamconv-{token_hex(8)}"
        self._waiting = deque(shards)
        self._attempts: Counter[str] = Counter()
        self._tasks: dict[Future, _Task] = {}
        self._written: dict[str, WrittenFile] = {}
        self._kept_bytes = 0
        self._losses: dict[str, _Losses] = {}
        self._reports = _Reports()

    def __enter__(self) -> "_Tasks":
        self._client.subscribe_topic(self._topic, self._reports.receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop the tasks that wait, and wait a few seconds until those that run have stopped."""
        try:
            if self._tasks and self._client.status == "running":
                self._client.cancel([*self._tasks])
                end = time.monotonic() + STOP_SECONDS
                while self._reports.running and time.monotonic() < end and self._client.status == "running":
                    self._reports.wait()
        finally:
            self._tasks.clear()
            self._workers.plans.clear()
            with suppress(Exception):  # the client may be closed; an error in the block must not be hidden
                self._client.unsubscribe_topic(self._topic)

    def run(self, progress: Progress) -> tuple[dict[str, WrittenFile], int]:
        total = sum(shard.size for shard in self._shards)
        step = f"writing {len(self._shards)} file{'s' * (len(self._shards) != 1)}"
        while True:
            progress(step, sum([*self._reports.positions.values()]), total, "bytes")
            if len(self._written) == len(self._shards):
                return {shard.filename: self._written[shard.filename] for shard in self._shards}, self._kept_bytes
            self._workers.update()
            self._collect()
            self._submit()
            self._reports.wait()

    def _submit(self) -> None:
        busy = Counter(task.worker for task in self._tasks.values())
        for worker in self._workers.free(busy):
            if not self._waiting:
                break
            shard = self._waiting.popleft()
            name = shard.filename
            self._attempts[name] += 1
            task = _Task(shard, worker, self._attempts[name])
            future = self._client.submit(
                write_file,
                self._workers.plans[worker],
                name,
                self._output,
                self._topic,
                task.attempt,
                key=(self._topic, name, task.attempt),
                workers=[worker],
            )
            self._tasks[future] = task
            busy[worker] += 1
            _log.debug("%s is written by the worker %s", name, worker)

    def _collect(self) -> None:
        """Collect the results of tasks that have ended, and return the files of lost workers to those that wait."""
        for future, task in [*self._tasks.items()]:
            if future.status == "error":
                self._end(future, future.exception())
            elif future.status == "finished":
                self._collect_result(future)
            elif future.status != "pending" or task.worker not in self._workers.plans:
                self._workers.require_scheduler()
                self._lose(future)

    def _end(self, future: "Future", error: Any) -> None:
        from distributed import KilledWorker

        if isinstance(error, KilledWorker):
            self._lose(future)
            return
        task = self._tasks.pop(future)
        _log.warning("%s failed on the Dask worker %s", task.shard.filename, getattr(error, "worker", task.worker))
        raise error

    def _collect_result(self, future: "Future") -> None:
        try:
            written, kept_bytes = future.result(timeout=RESULT_SECONDS)
        except Exception as error:  # the worker was lost before it sent the result
            _log.info("no result from %s: %s", self._tasks[future].worker, error)
            self._lose(future)
            return
        task = self._tasks.pop(future)
        self._written[task.shard.filename] = written
        self._kept_bytes += kept_bytes
        self._reports.positions[task.shard.filename] = task.shard.size

    def _lose(self, future: "Future") -> None:
        """Return the file of a lost worker to those that wait."""
        task = self._tasks.pop(future)
        future.cancel()
        self._workers.forget(task.worker)
        name = task.shard.filename
        self._reports.running.discard((name, task.attempt))
        position, before = self._reports.positions.get(name, 0), self._losses.get(name, _Losses())
        losses = _Losses(1 if position > before.position else before.count + 1, position)
        if losses.count >= MAX_LOSSES:
            raise OutputError(
                f"{MAX_LOSSES} workers in a row were lost while they wrote {name}, and none of them got further than "
                f"byte {position:,}; the last was {task.worker}. See their logs: they may have too little memory. Run "
                "the same command again to resume."
            )
        self._losses[name] = losses
        self._waiting.appendleft(task.shard)
        _log.warning("the Dask worker %s was lost while it wrote %s; another one resumes it", task.worker, name)
