"""The server that stands for a network in benchmarks keeps its limits; the formula for workers is right."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.scale_model import File, Network, Prediction, Upload, Worker, predict
from benchmarks.slow_server import BURST_SECONDS, Limits, SlowServer, TokenBucket, start_links

DATA = bytes(range(256)) * 2000  # 0.5 MB


@contextmanager
def links(folder: Path, limits: Limits) -> Iterator[list[SlowServer]]:
    (folder / "file").write_bytes(DATA)
    servers = start_links(folder, limits)
    try:
        yield servers
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def get(server: SlowServer, path: str = "/file", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


def seconds_to_get(servers: list[SlowServer]) -> float:
    """Return how long it takes to get the file once from each server, at the same time."""
    threads = [threading.Thread(target=get, args=[server]) for server in servers]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - started


def best_of(servers: list[SlowServer], at_most: float) -> float:
    """Repeat `seconds_to_get` if it takes longer than ``at_most``: the machine may be busy."""
    return next((seconds for _ in range(5) if (seconds := seconds_to_get(servers)) < at_most), 1e9)


def test_bucket_passes_bytes_at_its_rate() -> None:
    bucket = TokenBucket(1000)
    assert bucket.reserve(100, now=5) == pytest.approx(0.1 - BURST_SECONDS)
    assert bucket.reserve(100, now=5) == pytest.approx(0.2 - BURST_SECONDS)
    assert bucket.reserve(100, now=5.2) == pytest.approx(0.1 - BURST_SECONDS)  # 10 ms late: nothing is lost


def test_bucket_does_not_save_up_while_it_is_idle() -> None:
    bucket = TokenBucket(1000)
    bucket.reserve(100, now=5)
    assert bucket.reserve(100, now=60) == pytest.approx(0.1 - BURST_SECONDS)
    assert TokenBucket(0).reserve(10**9, now=60) == 0


def test_ranges_are_sent_to_a_client_that_uses_it_as_a_proxy(tmp_path: Path) -> None:
    with links(tmp_path, Limits()) as (server,):
        assert get(server) == (200, DATA)
        assert get(server, "http://elsewhere.test/file?x=1", Range="bytes=3-9") == (206, DATA[3:10])
        assert get(server, "/other")[0] == 404
        assert server.traffic.requests == 3
        assert server.traffic.sent == len(DATA) + 7
        assert server.traffic.ranges == [7]


@pytest.mark.parametrize(
    ("limits", "files_in_sequence"),
    [
        (Limits(links=2, connection_rate=5e6), 1),
        (Limits(links=2, link_rate=5e6), 1),
        (Limits(links=1, link_rate=5e6), 2),
        (Limits(links=2, total_rate=5e6), 2),
    ],
)
def test_connections_links_and_the_store_have_rates(tmp_path: Path, limits: Limits, files_in_sequence: int) -> None:
    expected = files_in_sequence * len(DATA) / 5e6 - BURST_SECONDS
    with links(tmp_path, limits) as servers:
        assert expected < best_of([servers[0], servers[-1]], expected + 0.09) < expected + 0.09


def test_each_response_begins_after_the_latency_also_if_others_wait(tmp_path: Path) -> None:
    with links(tmp_path, Limits(latency=0.1)) as servers:
        assert 0.1 < best_of(servers * 4, 0.19) < 0.19


FILE = File(size=100, requests=(25,) * 4)
WORKER = Worker(rate=100, file_seconds=0.0, cpu_to_start=0.1, cpu_per_byte=0.001, in_flight=2, buffered=10)


@pytest.mark.parametrize(
    ("workers", "network", "cores", "expected"),
    [
        (1, Network(links=1), 1, Prediction(2.0, "worker")),
        (4, Network(links=4), 1, Prediction(2.0, "worker")),
        (4, Network(links=4, link_rate=50), 1, Prediction(4.0, "link")),
        (4, Network(links=1, link_rate=50), 1, Prediction(16.0, "link")),
        (4, Network(links=2, link_rate=50), 1, Prediction(8.0, "link")),
        (3, Network(links=2, link_rate=50), 1, Prediction(8.0, "link")),  # two share a link
        (4, Network(links=4, store_rate=100), 1, Prediction(8.0, "store")),
        (4, Network(links=4), 0.1, Prediction((0.8 + 0.4) / 0.1, "CPU")),
        (1, Network(links=1, latency=1), 1, Prediction(2 * 4 / 2 * 1, "requests in flight")),
        (1, Network(links=1, connection_rate=5), 1, Prediction(2 * (5 + 3 * 3), "requests in flight")),
        (1, Network(links=1, connection_rate=5, latency=9), 1, Prediction(2 * (14 + 3 + 11 + 3), "requests in flight")),
    ],
)
def test_slowest_resource_decides(workers: int, network: Network, cores: float, expected: Prediction) -> None:
    assert predict([[FILE] * 2] * workers, WORKER, network, cores) == expected


def test_upload_begins_when_a_part_is_read_and_waits_for_its_calls() -> None:
    upload = Upload(part_bytes=50, at_once=1, calls=3)
    worker = Worker(rate=1e9, file_seconds=0, cpu_to_start=0, cpu_per_byte=0, in_flight=9, buffered=1e9, upload=upload)
    fast = predict([[FILE]], worker, Network(links=1, link_rate=10), 1)
    assert fast == Prediction(100 / 10 + 50 / 10, "link")
    slow = predict([[FILE]], worker, Network(links=1, connection_rate=10, latency=2), 1)
    assert slow == Prediction(2 * (2 + 50 / 10) + 3 * 2 + 50 / 10, "parts in flight")


def test_largest_part_and_the_time_between_files_count() -> None:
    worker = Worker(rate=100, file_seconds=0.5, cpu_to_start=0, cpu_per_byte=0, in_flight=2, buffered=0)
    assert predict([[FILE] * 2, [FILE] * 3, []], worker, Network(links=3), 1) == Prediction(3 * 1.5, "worker")
