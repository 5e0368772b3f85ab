"""Dask workers, clients and schedulers that are killed while they write: nothing is lost, and the output is right."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from distributed import Client, LocalCluster, WorkerPlugin

import streamconv
from streamconv import Conversion, ConversionOptions, OutputError
from streamconv.jobs.dask.client import NO_DASHBOARD
from streamconv.progress import Progress, ignore_progress
from tests import dask_workers as on_workers
from tests.support import Save, contents, read_terminal, tiny

SHARD_SIZE = "4MB"
MODEL = tiny(layers=4, hidden=256)  # 13 MB in 4 files
PAUSE = 0.01  # seconds after each 8 kB
KILLS = 3  # a file that loses four workers in a row is given up


class Setup(WorkerPlugin):  # type: ignore[misc]
    """Calls a function in every worker process, also in those that replace others."""

    def __init__(self, call: Callable[[], None]):
        self._call = call

    def setup(self, worker: object) -> None:
        self._call()


@contextmanager
def processes(setup: Callable[[], None]) -> Iterator[Client]:
    """Start two workers of one thread each, which Dask replaces if they are killed."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=NO_DASHBOARD,
            scheduler_kwargs={"dashboard": False},
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        client.register_plugin(Setup(setup))
        yield client


@pytest.fixture
def slow_workers() -> Iterator[Client]:
    with processes(partial(on_workers.write_slowly, PAUSE)) as client:
        yield client


def convert(source: Path, out: Path, client: Client | None = None, progress: Progress = ignore_progress) -> Conversion:
    options = ConversionOptions(max_shard_size=SHARD_SIZE)
    return streamconv.convert(source, out, options, client=client, progress=progress)


def busy(client: Client) -> dict[str, int]:
    """Return the process of each worker that runs a task."""
    return {
        worker: pid
        for worker, (pid, tasks) in client.run(
            lambda dask_worker: (os.getpid(), dask_worker.state.executing_count)
        ).items()
        if tasks
    }


def test_killed_workers_lose_nothing(
    slow_workers: Client, save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = save(MODEL)
    convert(source, tmp_path / "expected")
    positions, killed, seen = [0], [], []

    def kill_now_and_then(step: str, done: int, total: int, unit: str) -> None:
        assert done >= positions[-1]
        positions.append(done)
        if len(killed) < KILLS and done > total * (len(killed) + 1) // (KILLS + 1) and (found := busy(slow_workers)):
            seen.extend(worker for worker in found if worker not in seen)
            oldest = min(found, key=seen.index)  # it has written most
            os.kill(found[oldest], signal.SIGKILL)
            killed.append(oldest)

    done = convert(source, tmp_path / "out", slow_workers, kill_now_and_then)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert len(set(killed)) == KILLS
    lost = {message.split()[3] for message in caplog.messages if "was lost while it wrote" in message}
    assert lost >= {*killed}
    assert done.resumed_bytes > 0  # these files were not begun again


def test_file_that_kills_its_workers_is_given_up(save: Save, tmp_path: Path) -> None:
    source, _ = save(tiny())
    with processes(on_workers.end_when_writing) as client:
        expected = r"^4 workers in a row were lost while they wrote model.*, and none of them got further than byte 0;"
        with pytest.raises(OutputError, match=expected):
            convert(source, tmp_path / "out", client)


def test_restarted_cluster_is_used_again(slow_workers: Client, save: Save, tmp_path: Path) -> None:
    """A restart ends all tasks, and removes the plan from the cluster."""
    source, _ = save(MODEL)
    convert(source, tmp_path / "expected")
    restarts = []

    def restart(step: str, done: int, total: int, unit: str) -> None:
        if done > total // 4 and not restarts:
            restarts.append(slow_workers.restart())

    assert convert(source, tmp_path / "out", slow_workers, restart).resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_workers_of_a_killed_client_stop(slow_workers: Client, save: Save, tmp_path: Path) -> None:
    source, _ = save(MODEL)
    convert(source, tmp_path / "expected")
    words = ["convert", source, "-o", "out", "--max-shard-size", SHARD_SIZE, "--scheduler"]
    command = [sys.executable, "-m", "streamconv", *map(str, words), slow_workers.scheduler.address]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_until(lambda: bool(list(tmp_path.glob("out/.*-incomplete"))))
    time.sleep(1)
    assert len(busy(slow_workers)) == 2
    process.kill()
    process.wait()
    wait_until(lambda: not busy(slow_workers), 5)
    slow_workers.run(on_workers.refuse_busy_files)
    assert convert(source, tmp_path / "out", slow_workers).resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_lost_scheduler_is_reported_and_its_work_resumed(save: Save, tmp_path: Path) -> None:
    source, _ = save(MODEL)
    convert(source, tmp_path / "expected")
    file = tmp_path / "scheduler.json"
    scheduler = dask("scheduler", file, "--port", "0", "--dashboard-address", NO_DASHBOARD)
    worker = dask("worker", file, "--nthreads", "2", "--no-nanny", "--local-directory", str(tmp_path / "dask"))
    try:
        wait_until(file.exists)
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(1, 30)
            client.register_plugin(Setup(partial(on_workers.write_slowly, PAUSE)))

            def kill_scheduler(step: str, done: int, total: int, unit: str) -> None:
                if done > total // 4:
                    scheduler.kill()

            with pytest.raises(OutputError, match=r"connection to the Dask scheduler at tcp://\S+ was lost\. Run"):
                convert(source, tmp_path / "out", client, kill_scheduler)
        assert worker.wait(10) is not None
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()
    with processes(partial(on_workers.write_slowly, 0)) as client:  # in steps of the same size
        assert convert(source, tmp_path / "out", client).resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_ctrl_c_reaches_only_the_command(save: Save, tmp_path: Path) -> None:
    """No traceback of a worker is printed, no process or temporary file stays, and the same command resumes."""
    source, _ = save(tiny(layers=12, hidden=768))
    convert(source, tmp_path / "expected")
    (tmp_path / "tmp").mkdir()
    main, other = pty.openpty()
    words = ["convert", str(source), "-o", "out", "--max-shard-size", SHARD_SIZE, "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "streamconv", *words],
        cwd=tmp_path,
        stdin=other, stdout=other, stderr=other,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # makes it the controlling terminal
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )  # fmt: skip
    os.close(other)
    wait_until(lambda: bool(list(tmp_path.glob("out/.*-incomplete"))))
    os.write(main, b"\x03")
    seen = read_terminal(main)
    assert process.wait(10) == 130
    assert "Traceback" not in seen
    assert "Interrupted. To resume, run" in seen
    assert list((tmp_path / "tmp").iterdir()) == []
    again = subprocess.run([sys.executable, "-m", "streamconv", *words], cwd=tmp_path, capture_output=True, text=True)
    assert (again.returncode, again.stderr.count("warning")) == (0, 0)
    assert "before an interruption" in again.stdout
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def dask(what: str, file: Path, *options: str) -> "subprocess.Popen[bytes]":
    """Start a scheduler or a worker that finds the other by a file."""
    module = f"distributed.cli.dask_{what}"
    command = [sys.executable, "-m", module, "--scheduler-file", str(file), "--no-dashboard", *options]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def wait_until(is_true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.05)
