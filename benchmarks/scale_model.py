"""A formula for the seconds in which workers write the parts of a plan, and for what limits them.

Each resource is busy for some seconds: a worker with its files, one after the other, a link with the bytes of its
workers, the store and the cores with all bytes. The work cannot be faster than the slowest of them, and if they
overlap well, it is as fast. So the prediction is the maximum. `benchmarks.scale` compares it with measurements, and
uses the same function for the model on paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

NO_LIMIT = float("inf")


@dataclass(frozen=True)
class File:
    """A weight file: its size in bytes, and the number of requests by which its bytes are read."""

    size: int
    requests: int


@dataclass(frozen=True)
class Worker:
    """What a process can do if no network limits it.

    ``rate`` is in bytes per second within a file. ``file_seconds``: to open, sync and rename a file, during which no
    bytes are read. ``cpu_per_byte``: CPU seconds, including those of servers on the same cores. ``in_flight``: requests
    that have been sent and not been read.
    """

    rate: float
    file_seconds: float
    cpu_per_byte: float
    in_flight: int


@dataclass(frozen=True)
class Network:
    """Rates in bytes per second. Worker i uses the link i modulo ``links``.

    ``store_rate``: of all links together. ``connection_rate``: of one request. ``latency``: seconds until a response
    begins.
    """

    links: int
    link_rate: float = NO_LIMIT
    store_rate: float = NO_LIMIT
    connection_rate: float = NO_LIMIT
    latency: float = 0.0


@dataclass(frozen=True)
class Prediction:
    seconds: float
    limit: str


def predict(parts: Sequence[Sequence[File]], worker: Worker, network: Network, cores: float) -> Prediction:
    """Predict the seconds for one worker for each part; they share ``cores``."""
    sizes = [sum(file.size for file in part) for part in parts]
    busiest_link = max(sum(sizes[link :: network.links]) for link in range(network.links))
    edges = network.latency + worker.file_seconds  # before the first byte, and after the last one
    shared = [
        Prediction(busiest_link / network.link_rate + edges, "link"),
        Prediction(sum(sizes) / network.store_rate + edges, "store"),
        Prediction(sum(sizes) * worker.cpu_per_byte / cores, "CPU"),
    ]
    return max(*(_alone(part, worker, network) for part in parts), *shared, key=lambda each: each.seconds)


def _alone(part: Sequence[File], worker: Worker, network: Network) -> Prediction:
    """Predict the seconds for one part if no other worker exists."""
    seconds, limit = 0.0, Prediction(0.0, "worker")
    for file in part:
        slowest = max(
            Prediction(file.size / worker.rate, "worker"),
            Prediction(file.size / network.link_rate, "link"),
            Prediction(_in_flight_seconds(file, worker, network), "requests in flight"),
            key=lambda each: each.seconds,
        )
        limit = max(limit, slowest, key=lambda each: each.seconds)
        # Nothing is requested for the next file before this one is complete.
        seconds += network.latency + slowest.seconds + worker.file_seconds
    return Prediction(seconds, limit.limit)


def _in_flight_seconds(file: File, worker: Worker, network: Network) -> float:
    """Return the seconds of a file's requests if ``in_flight`` of them are always on their way."""
    each = network.latency + file.size / file.requests / network.connection_rate
    return file.requests * each / worker.in_flight
