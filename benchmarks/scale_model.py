"""A formula for the seconds in which workers write the parts of a plan, and for what limits them.

Each resource is busy for some seconds: a worker with its files, one after the other, a link with the bytes of its
workers, the store and the cores with all bytes. The work cannot be faster than the slowest of them, and if they
overlap well, it is as fast. So the prediction is the maximum. `benchmarks.scale` compares it with measurements, and
uses the same function for the model on paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

NO_LIMIT = float("inf")


@dataclass(frozen=True)
class File:
    """A weight file: its size in bytes, and those of the requests by which its source's bytes are read, in order."""

    size: int
    requests: tuple[int, ...]


@dataclass(frozen=True)
class Upload:
    """How a worker writes to a store: parts of so many bytes, ``at_once`` of them in flight.

    ``calls`` are the requests for each file that wait for one another: its state, its record, its beginning and end.
    """

    part_bytes: int
    at_once: int
    calls: int


@dataclass(frozen=True)
class Worker:
    """What a process can do if no network limits it.

    ``rate`` is in bytes per second within a file. ``file_seconds``: to open, sync and rename a file, during which no
    bytes are read. ``cpu_to_start`` and ``cpu_per_byte``: CPU seconds, including those of servers on the same cores.
    ``in_flight``: requests that have been sent and not been read. Responses are read in order; of each that waits, up
    to ``buffered`` bytes arrive meanwhile.
    """

    rate: float
    file_seconds: float
    cpu_to_start: float
    cpu_per_byte: float
    in_flight: int
    buffered: float
    upload: Upload | None = None


@dataclass(frozen=True)
class Network:
    """Rates in bytes per second, each way. Worker i uses the link i modulo ``links``.

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
        Prediction((sum(sizes) * worker.cpu_per_byte + len(parts) * worker.cpu_to_start) / cores, "CPU"),
    ]
    return max(*(_alone(part, worker, network) for part in parts), *shared, key=lambda each: each.seconds)


def _alone(part: Sequence[File], worker: Worker, network: Network) -> Prediction:
    """Predict the seconds for one part if no other worker exists."""
    seconds, limit = 0.0, Prediction(0.0, "worker")
    for file in part:
        slowest = max(
            Prediction(file.size / worker.rate, "worker"),
            Prediction(network.latency + file.size / network.link_rate, "link"),
            Prediction(_reading(file, worker, network), "requests in flight"),
            Prediction(_sending(file, worker, network), "parts in flight"),
            key=lambda each: each.seconds,
        )
        limit = max(limit, slowest, key=lambda each: each.seconds)
        # Nothing is requested for the next file before this one is complete.
        seconds += slowest.seconds + worker.file_seconds + _around_upload(file, worker, network)
    return Prediction(seconds, limit.limit)


@cache
def _reading(file: File, worker: Worker, network: Network) -> float:
    """Return when the last response has been read.

    A request is sent when the one ``in_flight`` places before it has been read.
    """
    ends = [0.0] * worker.in_flight
    for number, size in enumerate(file.requests):
        sent, free = ends[number], ends[-1]
        arrived = sent + network.latency + size / network.connection_rate
        ends.append(max(free, arrived, free + (size - worker.buffered) / network.connection_rate))
    return ends[-1]


def _sending(file: File, worker: Worker, network: Network) -> float:
    """Return the seconds of an upload if as many parts as possible are always on their way."""
    if worker.upload is None:
        return 0.0
    seconds = file.size / worker.upload.part_bytes * network.latency + file.size / network.connection_rate
    return seconds / min(worker.upload.at_once, -(-file.size // worker.upload.part_bytes))


def _around_upload(file: File, worker: Worker, network: Network) -> float:
    """Return the seconds in which an upload and the reading of its file do not overlap."""
    if worker.upload is None:
        return 0.0
    first = min(file.size, worker.upload.part_bytes)  # is read before anything is sent
    return worker.upload.calls * network.latency + first / min(network.link_rate, network.connection_rate)
