"""The cases of `benchmarks.scale`: how each is measured, and predicted."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import streamconv
from benchmarks.scale_model import NO_LIMIT, File, Network, Prediction, Upload, Worker, predict
from benchmarks.scale_runs import Measured, make_source, run_workers, save_plan
from benchmarks.slow_server import Limits
from streamconv.files.remote import MAX_IN_FLIGHT
from streamconv.output.stores.s3_upload import PART_BYTES, PARTS_AT_ONCE
from streamconv.planning.parts import Part, shards_of
from streamconv.planning.plan import Plan

Scheme = Literal["http", "s3"]
# Responses that wait are in socket buffers. Over S3, they are in memory as a whole. Found by trying on this machine.
BUFFERED: dict[Scheme, float] = {"http": 0.75e6, "s3": NO_LIMIT}
UPLOAD = Upload(PART_BYTES, PARTS_AT_ONCE, calls=6)
ONE_FILE, BLOCKS, THREE_BLOCKS, TENSORS = "5GB", "9.7MB", "29MB", "0.3MB"
LINK = 40e6


@dataclass(frozen=True)
class Case:
    """Workers that write a plan with files of at most ``shard_size``, over a network.

    ``is_large``: the source has tensors of up to 51 MB instead of 3.2 MB.
    """

    workers: int
    limits: Limits = field(default_factory=Limits)
    shard_size: str = BLOCKS
    scheme: Scheme = "http"
    output: Literal["memory", "disk", "s3"] = "memory"
    is_large: bool = False


ALONE: dict[Scheme, Case] = {scheme: Case(1, scheme=scheme) for scheme in BUFFERED}
WHOLE: dict[Scheme, Case] = {scheme: Case(1, scheme=scheme, shard_size=ONE_FILE) for scheme in BUFFERED}
LARGE: dict[Scheme, Case] = {scheme: Case(1, scheme=scheme, shard_size=ONE_FILE, is_large=True) for scheme in BUFFERED}
EIGHT = Case(8)
TO_S3 = Case(1, shard_size=ONE_FILE, output="s3")
CALIBRATION = (*ALONE.values(), *WHOLE.values(), *LARGE.values(), EIGHT, TO_S3)
SECTIONS: dict[str, list[Case]] = {
    "No limits": [*(Case(n) for n in (1, 2, 4)), EIGHT, WHOLE["http"], LARGE["http"]],
    "No limits, output on the disk": [Case(n, output="disk") for n in (1, 8)],
    "A link for each worker": [Case(n, Limits(links=n, link_rate=LINK)) for n in (1, 2, 4, 8)],
    "One link for all workers": [Case(n, Limits(link_rate=2 * LINK)) for n in (1, 2, 4, 8)],
    "Eight workers on a few links": [Case(8, Limits(links=n, link_rate=LINK)) for n in (2, 4)],
    "Few files": [Case(n, Limits(links=n, link_rate=LINK), THREE_BLOCKS) for n in (4, 5, 8)],
    "Latency": [
        Case(1, Limits(latency=0.005)),
        Case(1, Limits(latency=0.05)),
        Case(1, Limits(latency=0.05), ONE_FILE),
        Case(1, Limits(latency=0.05), ONE_FILE, is_large=True),
    ],
    "A limit for each request": [
        *(Case(1, Limits(connection_rate=LINK, latency=seconds), ONE_FILE) for seconds in (0, 0.05)),
        Case(1, Limits(connection_rate=LINK), ONE_FILE, is_large=True),
    ],
    "From S3": [
        *(WHOLE["s3"], ALONE["s3"], LARGE["s3"]),
        Case(1, Limits(latency=0.05), ONE_FILE, "s3", is_large=True),
        Case(1, Limits(connection_rate=LINK, latency=0.05), ONE_FILE, "s3", is_large=True),
    ],
    "To S3": [
        TO_S3,
        *(Case(n, Limits(links=n, link_rate=LINK), THREE_BLOCKS, output="s3") for n in (1, 2, 5)),
        Case(1, Limits(connection_rate=LINK / 4, latency=0.05), ONE_FILE, "s3", "s3", is_large=True),
    ],
}  # fmt: skip


class Scale:
    """Measures cases, and predicts them. ``found`` holds what was measured."""

    def __init__(self, place: Path, memory: Path, layers: int):
        self.sources = {
            False: make_source(place / "source" / "model.pth", 448, layers),  # equal blocks of 9.6 MB
            True: make_source(place / "large" / "model.pth", 112 * layers, 1),
        }
        self._place, self._memory = place, memory
        self._plans: dict[tuple[str, str, bool], tuple[Path, Plan]] = {}
        self.found: dict[Case, list[Measured]] = {}
        self.workers: dict[tuple[Scheme, bool], Worker] = {}

    def plan(self, case: Case) -> tuple[Path, Plan]:
        key = case.scheme, case.shard_size, case.is_large
        if key not in self._plans:
            path = self._place / f"{len(self._plans)}.plan.json"
            self._plans[key] = path, save_plan(self.sources[case.is_large], case.scheme, path, case.shard_size).plan
        return self._plans[key]

    def output(self, case: Case) -> str:
        return (
            "s3://bucket/out"
            if case.output == "s3"
            else f"{self._place if case.output == 'disk' else self._memory}/out"
        )

    def bytes_of(self, case: Case) -> int:
        return sum(shard.size for shard in self.plan(case)[1].shards)

    def measure(self, case: Case) -> Measured:
        found = run_workers(
            self.plan(case)[0], case.workers, self.sources[case.is_large], case.limits, self.output(case)
        )
        self.found.setdefault(case, []).append(found)
        return found

    def calibrate(self) -> None:
        """Find out what a worker does without limits.

        Other runs have the same bytes in one file, larger tensors, and eight workers, of which each has to start.
        """
        for scheme, buffered in BUFFERED.items():
            alone, whole, large = (self._median(cases[scheme]) for cases in (ALONE, WHOLE, LARGE))
            files = len(self.plan(ALONE[scheme])[1].shards)
            file_seconds = max(0.0, alone[0] - whole[0]) / max(1, files - 1)
            start = max(0.0, self._median(EIGHT)[1] - self._median(ALONE["http"])[1]) / (EIGHT.workers - 1)
            for is_large, (seconds, cpu), case in (
                (False, (whole[0], alone[1]), ALONE[scheme]),
                (True, large, LARGE[scheme]),
            ):
                size = self.bytes_of(case)
                rate, cpu_per_byte = size / (seconds - file_seconds), (cpu - start) / size
                self.workers[scheme, is_large] = Worker(
                    rate, file_seconds, start, cpu_per_byte, MAX_IN_FLIGHT, buffered
                )

    def _median(self, case: Case) -> tuple[float, float]:
        """Return the seconds of a case, and its CPU seconds with the server's."""
        runs = self.found[case]
        return statistics.median(run.seconds for run in runs), statistics.median(
            run.cpu + run.traffic.cpu for run in runs
        )

    def predict(self, case: Case) -> Prediction:
        worker, limits = self.workers[case.scheme, case.is_large], case.limits
        if case.output == "s3":
            (seconds, cpu), size = self._median(TO_S3), self.bytes_of(TO_S3)
            cpu_per_byte = (cpu - worker.cpu_to_start) / size
            worker = replace(worker, upload=UPLOAD, rate=size / seconds, cpu_per_byte=cpu_per_byte)
        files = self._files(case)
        parts = [
            [files[shard.filename] for shard in shards_of(self.plan(case)[1].shards, Part(number, case.workers))]
            for number in range(1, case.workers + 1)
        ]
        network = Network(
            links=limits.links,
            link_rate=limits.link_rate or NO_LIMIT,
            connection_rate=limits.connection_rate or NO_LIMIT,
            latency=limits.latency,
        )
        return predict(parts, worker, network, max(0.1, (os.cpu_count() or 1) - self.others(case)))

    def others(self, case: Case) -> float:
        """Return the number of cores that other processes used."""
        return statistics.median(run.others for run in self.found[case])

    def ranges(self, scheme: Scheme, is_large: bool) -> list[int]:
        """Return the sizes of the requests for a source, in order."""
        return self.found[LARGE[scheme] if is_large else ALONE[scheme]][0].traffic.ranges

    def _files(self, case: Case) -> dict[str, File]:
        """Return a plan's files, with the requests that one worker sent for as many bytes in its run without limits."""
        ranges, files = iter(self.ranges(case.scheme, case.is_large)), {}
        for shard in self.plan(case)[1].shards:
            requests: list[int] = []
            while sum(requests) < shard.size and (size := next(ranges, 0)):
                requests.append(size)
            files[shard.filename] = File(shard.size, tuple(requests))
        return files

    def finish(self, case: Case) -> float:
        """Write the files of a plan, and return how long it takes to finish the folder."""
        self.measure(case)
        start = time.monotonic()
        streamconv.finish(self.output(case), self.plan(case)[0])
        return time.monotonic() - start


def rates(scale: Scale, case: Case) -> Sequence[float]:
    """Return the MB/s of each run of a case."""
    return [scale.bytes_of(case) / 1e6 / run.seconds for run in scale.found[case]]
