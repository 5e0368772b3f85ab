"""Conversions by the workers of a Dask cluster: processes, or threads of this process if they will do."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster
from distributed.client import default_client

import streamconv
from streamconv import Cancelled, Conversion, ConversionOptions, CorruptError, OutputError, UsageError
from streamconv.cli.cluster import cluster_client
from streamconv.jobs.dask import client as dask_client
from streamconv.jobs.dask import workers as dask_workers
from streamconv.jobs.dask.client import client_of, local_client
from streamconv.jobs.dask.dispatch import STOP_SECONDS
from streamconv.progress import Progress, ignore_progress
from tests import dask_workers as on_workers
from tests.support import Save, contents, flip, run, tiny

OPTIONS = ConversionOptions(max_shard_size="500kB")


@pytest.fixture(scope="module")
def processes() -> Iterator[Client]:
    """Yield a client of two workers that are processes, with one thread each."""
    with local_client(2) as client:
        yield client


@pytest.fixture
def client(processes: Client) -> Iterator[Client]:
    yield processes
    processes.run(on_workers.restore)


@contextmanager
def threads(workers: int) -> Iterator[tuple[LocalCluster, Client]]:
    """Start a scheduler with workers in this process, which takes a fraction of a second."""
    places = {"dashboard_address": dask_client.NO_DASHBOARD, "scheduler_kwargs": {"dashboard": False}}
    with (
        LocalCluster(n_workers=workers, processes=False, threads_per_worker=1, **places) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield cluster, client


def convert(source: Path, out: Path, client: Client | None = None, progress: Progress = ignore_progress) -> Conversion:
    return streamconv.convert(source, out, OPTIONS, client=client, progress=progress)


def test_output_equals_that_of_one_process(client: Client, save: Save, tmp_path: Path) -> None:
    """All files are equal, the manifest too; the output's path is relative, and workers have other current folders."""
    source, _ = save(tiny(layers=4))
    expected = convert(source, tmp_path / "expected")
    reports: list[tuple[str, int, int, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        done = convert(source, Path("out"), client, lambda *report: reports.append(report))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert (done.shards, done.resumed_bytes) == (expected.shards, 0)
    steps, positions, totals, _ = zip(*(each for each in reports if each[3] == "bytes"), strict=True)
    assert set(steps) == {f"writing {len(done.shards)} files"}
    assert list(positions) == sorted(positions)
    assert {positions[-1]} == set(totals) == {sum(shard.size for shard in done.plan.shards)}
    assert convert(source, tmp_path / "out", client).was_finished
    assert list(client.futures) == []  # no plan stays on the cluster


def test_cancelled_output_is_resumed_at_once(client: Client, save: Save, tmp_path: Path) -> None:
    source, _ = save(tiny(layers=4))
    convert(source, tmp_path / "expected")
    client.run(on_workers.write_slowly, 0.3)  # a file would take 8 s
    error, times = Cancelled(), []

    def cancel(step: str, done: int, total: int, unit: str) -> None:
        if done > 130_000:
            times.append(time.monotonic())
            raise error

    with pytest.raises(Cancelled) as caught:
        convert(source, tmp_path / "out", client, cancel)
    assert caught.value is error
    assert time.monotonic() - times[0] < STOP_SECONDS
    client.run(on_workers.restore)
    client.run(on_workers.write_slowly, 0)  # in steps of the same size
    client.run(on_workers.refuse_busy_files)
    assert convert(source, tmp_path / "out", client).resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_error_of_a_task_reaches_the_caller(
    client: Client, save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged source is reported as by one process, and once: the task is not repeated."""
    source, _ = save(tiny(layers=4))
    flip(source, "blocks.2.mlp.fc1.weight", 1000)
    with pytest.raises(CorruptError, match=r"layer\.2\.mlp\.fc1\.weight .* does not match its CRC-32") as caught:
        convert(source, tmp_path / "out", client)
    assert caught.value.location == source
    (logged,) = (each.getMessage() for each in caplog.records if "failed on the Dask worker" in each.getMessage())
    assert any(worker in logged for worker in client.nthreads())
    assert not list((tmp_path / "out").glob("config.json"))


def test_worker_of_another_version_is_refused(client: Client, save: Save, tmp_path: Path) -> None:
    source, _ = save(tiny())
    worker, _ = client.nthreads()
    client.run(on_workers.pretend_version, "0.0.1", workers=[worker])
    with pytest.raises(UsageError) as caught:
        convert(source, tmp_path / "out", client)
    assert str(caught.value) == (
        f"1 of 2 Dask workers cannot be used. Each needs streamconv {streamconv.__version__} and the same files under "
        f"the same paths. {worker}: it has streamconv 0.0.1"
    )
    assert list(tmp_path.glob("out/*")) == []


def test_worker_without_the_package_is_refused_and_not_harmed(
    client: Client, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask gives up a worker that cannot unpickle a task."""
    source, _ = save(tiny())
    workers = client.nthreads()
    monkeypatch.setattr(dask_workers, "inspect_worker", _missing_there)
    with pytest.raises(UsageError, match=r"2 of 2 .* cannot be imported there: .*No module named 'not_installed'"):
        convert(source, tmp_path / "out", client)
    assert client.nthreads() == workers


class _MissingThere:
    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("not_installed",)

    def __call__(self) -> None: ...


_missing_there = _MissingThere()


def test_workers_that_join_later_are_used(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler without workers is waited for."""
    monkeypatch.setattr(dask_workers, "UPDATE_SECONDS", 0.02)
    source, _ = save(tiny())
    steps: list[str] = []
    with threads(0) as (cluster, client):

        def add_worker(step: str, done: int, total: int, unit: str) -> None:
            if not steps:
                cluster.scale(1)
            steps.append(step)

        convert(source, tmp_path / "out", client, add_worker)
    assert steps[0].startswith("waiting for a worker of inproc://")
    assert steps[-1].startswith("writing")
    assert (tmp_path / "out/streamconv.json").exists()


def test_unusable_worker_that_joins_later_is_not_used(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dask_workers, "UPDATE_SECONDS", 0.02)
    source, _ = save(tiny())
    with threads(1) as (cluster, client):
        (first,) = client.nthreads()

        def add_worker(step: str, done: int, total: int, unit: str) -> None:
            if step.startswith("writing") and len(client.nthreads()) == 1:
                on_workers.pretend_version("0.0.1")
                cluster.scale(2)
                client.wait_for_workers(2, timeout=10)

        try:
            convert(source, tmp_path / "out", client, add_worker)
        finally:
            on_workers.restore()
        (second,) = client.nthreads().keys() - {first}
    assert f"the Dask worker {second} is not used: it has streamconv 0.0.1" in caplog.messages


def test_missing_workers_are_not_waited_for_forever(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_workers, "UPDATE_SECONDS", 0.02)
    monkeypatch.setattr(dask_workers, "WAIT_SECONDS", 0.1)
    source, _ = save(tiny())
    with (
        threads(0) as (_, client),
        pytest.raises(OutputError, match=r"inproc://\S+ has had no worker for 0.1 s. Start"),
    ):
        convert(source, tmp_path / "out", client)


def test_command_uses_a_running_cluster(client: Client, save: Save, tmp_path: Path) -> None:
    source, _ = save(tiny())
    convert(source, tmp_path / "expected")
    words = ["convert", source, "-o", "out", "--max-shard-size", "500kB", "--scheduler", client.scheduler.address]
    ran = run(*words, cwd=tmp_path)
    assert (ran.returncode, ran.stderr.splitlines()[0]) == (0, f"connecting to {client.scheduler.address}")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_addresses_without_a_scheduler_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_client, "CONNECT_SECONDS", 0.2)
    with pytest.raises(UsageError, match=r"No Dask scheduler answers at tcp://127.0.0.1:9 within 0.2 s"):
        client_of("tcp://127.0.0.1:9").__enter__()
    with pytest.raises(UsageError, match=r"^ftp://x is not the address of a Dask scheduler: .*ftp.* Give one such as"):
        client_of("ftp://x").__enter__()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    for context in (client_of("tcp://127.0.0.1:9"), local_client(2)):
        with pytest.raises(UsageError, match=r"pip install 'streamconv\[dask\]'"):
            context.__enter__()


def test_too_many_local_workers_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^1000000 workers would have 0 MiB of memory each, .* Start at most \d+\.$"):
        local_client(1_000_000).__enter__()


def test_process_keeps_its_dask_settings(client: Client) -> None:
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [each.level for each in loggers]
    with cluster_client(client.scheduler.address, None, ignore_progress) as other:
        assert isinstance(other, Client)
        assert all(each.level > logging.CRITICAL for each in loggers)
    assert other.status == "closed"
    assert [each.level for each in loggers] == levels
    with pytest.raises(ValueError, match="No clients found"):
        default_client()
    assert dask.config.get("scheduler", None) is None
