"""Runs workers against a slow server, and measures them; the harness of `benchmarks.scale`."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import ENVIRONMENT
from benchmarks.slow_server import Limits, Traffic
from streamconv.families.dinov2 import FAMILY
from streamconv.families.dinov2_geometry import Dimensions
from streamconv.formats.torch_writer import write_pth
from streamconv.output import plan_file
from streamconv.output.planned import PlannedConversion

# The host does not exist: each worker reaches it through its link, as its proxy. For S3, the link is the endpoint.
SOURCES = {"http": "http://checkpoints.test", "s3": "s3://bucket"}


@dataclass(frozen=True)
class Measured:
    """The work of all workers: seconds from the first one's begin to the last one's end, and CPU seconds of all.

    ``others``: the average number of cores that other processes used.
    """

    seconds: float
    cpu: float
    traffic: Traffic
    others: float


class Server:
    """A slow server in a process of its own. ``traffic`` is set when it has ended."""

    def __init__(self, urls: list[str]):
        self.urls, self.traffic = urls, Traffic()

    def environment(self, worker: int) -> dict[str, str]:
        """Return the environment of a worker whose network is one of the links."""
        link = self.urls[worker % len(self.urls)]
        no_proxy = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        credentials = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        return {
            **ENVIRONMENT,
            "http_proxy": link,
            "HTTP_PROXY": link,
            **no_proxy,
            "AWS_ENDPOINT_URL": link,
            **credentials,
        }


@contextmanager
def served(folder: Path, limits: Limits) -> Iterator[Server]:
    words = [sys.executable, "-m", "benchmarks.slow_store", str(folder), json.dumps(asdict(limits))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            server = Server(json.loads(process.stdout.readline()))
            yield server
            process.stdin.close()
            server.traffic = Traffic(**json.loads(process.stdout.read()))
        finally:
            process.kill()


def make_source(path: Path, hidden: int, layers: int) -> Path:
    """Write a checkpoint of ``layers`` equal blocks and little else."""
    infos = FAMILY.sources(Dimensions(hidden, layers, 4 * hidden, positions=5))
    path.parent.mkdir()
    with path.open("wb") as file:
        write_pth(file, path.stem, infos, lambda name: [os.urandom(infos[name].nbytes)])
    return path


def save_plan(source: Path, scheme: str, path: Path, shard_size: str) -> PlannedConversion:
    """Plan the conversion of a source that is served at one of `SOURCES`, save the plan, and return it."""
    # The sink of the benchmark cannot copy.
    options = ["--num-heads", "7", "--max-shard-size", shard_size, "--no-server-side-copy", "--save", str(path)]
    words = [sys.executable, "-m", "streamconv", "plan", f"{SOURCES[scheme]}/{source.name}", *options]
    with served(source.parent, Limits()) as server:
        subprocess.run(words, check=True, stdout=sys.stderr, env=server.environment(0))
    return plan_file.read(path)


def run_workers(plan: Path, count: int, source: Path, limits: Limits, output: str) -> Measured:
    """Write all parts of a plan, each by a worker of its own, at the same time."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    with served(source.parent, limits) as server, ExitStack() as stack:
        workers = [
            stack.enter_context(_worker([str(plan), output, f"{i + 1}/{count}"], server.environment(i)))
            for i in range(count)
        ]
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != "ready\n":
                raise SystemExit("a worker failed")
        busy, start = busy_seconds(), time.monotonic()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        found = [json.loads(worker.communicate()[0] or "null") for worker in workers]
        busy, wall = busy_seconds() - busy, time.monotonic() - start
    if None in found:
        raise SystemExit("a worker failed")
    seconds = max(each["end"] for each in found) - min(each["begin"] for each in found)
    cpu = sum(each["cpu"] for each in found)
    return Measured(seconds, cpu, server.traffic, max(0.0, busy - cpu - server.traffic.cpu) / wall)


def busy_seconds() -> float:
    """Return the CPU seconds of all processes since the machine started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _worker(words: list[str], environment: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "benchmarks.scale_worker", *words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()
