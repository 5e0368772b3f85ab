"""Dask workers on this machine: processes with one thread each.

`distributed.LocalCluster` starts its workers by multiprocessing, which imports the caller's main module again, and
fails if that was read from stdin. Ctrl-C in a terminal interrupts those workers, and they print tracebacks. These
workers are in a session of their own, and print into a file.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from streamconv.child_python import python_command
from streamconv.display import printable
from streamconv.errors import UsageError

START_SECONDS = 60.0
POLL_SECONDS = 0.1
RESTART_SECONDS = 1.0
_RUN = "from distributed.cli.dask_worker import main; main()"


@contextmanager
def local_workers(client: Any, number: int, memory: int, folder: Path) -> Iterator[None]:
    """Start the workers of a scheduler; they end with the block. A worker that ends earlier is replaced.

    Args:
        memory: The limit of each, in bytes.
        folder: Receives their temporary files.

    Raises:
        UsageError: they cannot be started.
    """
    options = {"nthreads": 1, "memory-limit": memory, "local-directory": folder, "death-timeout": START_SECONDS}
    arguments = [client.scheduler.address, "--no-nanny", "--no-dashboard"]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    workers = _Workers(arguments, folder)
    try:
        workers.start(number)
        workers.wait(client)
        workers.replace_lost()
        yield
    finally:
        workers.close()


class _Workers:
    """The processes, and a thread that replaces those that have ended."""

    def __init__(self, arguments: list[str], folder: Path):
        self._command = [*python_command(_RUN), *arguments]
        self._messages = folder / "log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._is_closed = Event()
        self._thread = Thread(target=self._replace_lost, name="local workers", daemon=True)

    def start(self, number: int) -> None:
        try:
            self._processes += [self._process() for _ in range(number)]
        except OSError as error:
            raise UsageError(f"The local workers cannot be started: {error}.") from error

    def wait(self, client: Any) -> None:
        """Wait until all have joined."""
        number = len(self._processes)
        for _ in range(round(START_SECONDS / POLL_SECONDS)):
            if len(client.nthreads()) >= number:
                return
            if any(process.poll() is not None for process in self._processes):
                break
            self._is_closed.wait(POLL_SECONDS)
        lines = self._messages.read_text(errors="replace").split("\n")
        reason = next((printable(line) for line in reversed(lines) if line), f"none joined in {START_SECONDS:g} s")
        raise UsageError(f"The local workers cannot be started: {reason}.")

    def replace_lost(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the processes at once: their files are complete or can be resumed."""
        self._is_closed.set()
        if self._thread.is_alive():
            self._thread.join()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _replace_lost(self) -> None:
        while not self._is_closed.wait(RESTART_SECONDS):
            for i, process in enumerate(self._processes):
                if process.poll() is not None:
                    self._processes[i] = self._process()

    def _process(self) -> "subprocess.Popen[bytes]":
        with self._messages.open("ab") as log:
            return subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
