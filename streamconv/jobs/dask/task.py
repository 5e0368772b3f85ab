"""The functions that run on Dask workers: report whether a worker can be used, and write one weight file in a task."""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from streamconv import _version
from streamconv.errors import BusyError, Cancelled, StreamconvError
from streamconv.files.address import Location
from streamconv.files.reader import Reader
from streamconv.logs import logger
from streamconv.output.manifest import WrittenFile
from streamconv.output.open_shared import open_shared_output
from streamconv.output.planned import PlannedConversion
from streamconv.tensors.checksums import RecordChecks

_log = logger(__name__)

REPORT_SECONDS = 0.5
# How long to wait for the lock of a file. The process of a lost worker may be alive, cut off from the scheduler: it
# stops, but only when it notices that.
BUSY_SECONDS = 20.0
ENDED = -1  # reported instead of a position
# Memory for writing one file. Measured: 15 MB from a disk to a disk, 20 MB from http, 55 MB to S3; the process has 120.
WRITE_BYTES = 128 << 20
_AT_WORK = ("running", "paused", "closing_gracefully")  # states of a worker that the scheduler has not given up


def inspect_worker(sources: Mapping[str, int], folder: str, token: str, dask_worker: Any) -> tuple[str, int, list[str]]:
    """Report whether a worker can be used. Arguments and results are of built-in types, as it may have another version.

    Args:
        sources: The sizes of the source's local files by path.
        folder: The output; empty if it is not a folder.
        token: The name of a file in the folder, which is there only now.
        dask_worker: The worker, which Dask passes.

    Returns:
        The version of streamconv, the number of files that the worker may write at once, and what it cannot reach.
    """
    problems = []
    if folder and not os.path.exists(os.path.join(folder, token)):
        problems.append(f"{folder} is another folder there, or does not exist")
    for path, size in sources.items():
        try:
            if (found := os.stat(path).st_size) != size:
                problems.append(f"{path} has {found:,} bytes there, not {size:,}")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    limit = dask_worker.memory_manager.memory_limit or 0
    files = min(dask_worker.state.nthreads, max(1, limit // WRITE_BYTES) if limit else dask_worker.state.nthreads)
    return _version.__version__, files, [f"{each} (host {socket.gethostname()})" for each in problems]


def write_file(
    planned: PlannedConversion, filename: str, output: Location, topic: str, attempt: int
) -> tuple[WrittenFile, int]:
    """Write one weight file, or the rest of it. If the task is cancelled, it stops early; the file can be resumed.

    Args:
        topic: Receives events of the form (filename, attempt, number of bytes done, or `ENDED`).

    Returns:
        The complete file, and how many of its bytes an interrupted process had written.
    """
    (shard,) = (shard for shard in planned.plan.shards if shard.filename == filename)
    task = _RunningTask(filename, topic, attempt)
    try:
        task.advance(0)
        with Reader(accepts_unversioned=planned.has_checksums) as reader:
            while True:
                try:
                    return open_shared_output(output).write(planned, shard, reader, RecordChecks(reader), task.advance)
                except BusyError:
                    if task.seconds > BUSY_SECONDS:
                        raise
                    task.require_wanted()
                    time.sleep(REPORT_SECONDS)
    except StreamconvError as error:
        error.worker = f"{task.worker.address} on {socket.gethostname()}"  # type: ignore[attr-defined]
        raise
    finally:
        task.send(ENDED)


class _RunningTask:
    """The task that this thread of a worker runs."""

    def __init__(self, filename: str, topic: str, attempt: int):
        from distributed import get_worker

        self.worker = get_worker()
        self._key = self.worker.get_current_task()
        self._topic, self._filename, self._attempt = topic, filename, attempt
        self._start = time.monotonic()
        self._reported_at = -REPORT_SECONDS

    @property
    def seconds(self) -> float:
        """Seconds since the task began."""
        return time.monotonic() - self._start

    def advance(self, position: int, is_kept: bool = False) -> None:
        """Send the position from time to time.

        Raises:
            Cancelled: the task is not wanted any more.
        """
        if self.seconds - self._reported_at >= REPORT_SECONDS:
            self._reported_at = self.seconds
            self.require_wanted()
            self.send(position)

    def send(self, position: int) -> None:
        self.worker.log_event(self._topic, (self._filename, self._attempt, position))

    def require_wanted(self) -> None:
        """Check that the client has not cancelled the task, and that client and scheduler are still there.

        Dask cannot stop a thread, so a task must check whether it was cancelled.

        Raises:
            Cancelled
        """
        task = self.worker.state.tasks.get(self._key)
        if task is None or task.state == "cancelled" or self.worker.status.name not in _AT_WORK:
            raise Cancelled
