"""python -m benchmarks.stream [MODEL] [--runs N] [--dir DIR]: converting from a URL compared with curl -o.

A server on this machine (tests/file_server.py, which uses sendfile) stands for the network: first at full
speed, then, for sources below 1 GB, with the latency and speed of a distant server: 50 ms before each response
and 50 MB/s per connection. The runs are interleaved. `curl -o` is timed alone and with a sync, which
streamconv's time includes. Server and converter share the machine's cores.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import machine, made_source, parse_arguments

SETTLE_SECONDS = 4
WAYS = ("curl -o", "curl -o; sync", "streamconv convert --stream", "streamconv convert, from the file")
NETWORKS = {"at full speed": (0.0, 0.0), "50 ms latency, 50 MB/s per connection": (0.05, 0.02)}


@contextmanager
def served(folder: Path, latency: float, seconds_per_megabyte: float) -> Iterator[str]:
    """Serve a folder from a process of its own; yields its URL."""
    words = [sys.executable, "-m", "tests.file_server", str(folder), str(latency), str(seconds_per_megabyte)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def command(way: str, address: str, source: Path, out: Path) -> list[str]:
    curl = f"curl -s -o '{out}' '{address}'"
    convert = [sys.executable, "-m", "streamconv", "convert"]
    return {
        "curl -o": ["sh", "-c", curl],
        "curl -o; sync": ["sh", "-c", f"{curl} && sync"],
        "streamconv convert --stream": [*convert, address, "-o", str(out), "--stream"],
        "streamconv convert, from the file": [*convert, str(source), "-o", str(out)],
    }[way]


def measure(words: list[str], out: Path) -> tuple[float, float]:
    """Seconds and peak MB of one run."""
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    os.sync()
    time.sleep(SETTLE_SECONDS)
    start = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words} exited with {process.returncode}")
    return time.monotonic() - start, usage.ru_maxrss / 1024


def main() -> None:
    args = parse_arguments(__doc__, runs=5)
    with made_source(args.model, args.dir) as (source, out):
        print(f"{args.model}, {source.stat().st_size:,} bytes; {machine()}")
        print(
            f"`python -m benchmarks.stream {args.model} --runs {args.runs}`: median (minimum to maximum), interleaved"
        )
        for network, (latency, seconds_per_megabyte) in NETWORKS.items():
            if latency and source.stat().st_size > 10**9:
                continue
            with served(source.parent, latency, seconds_per_megabyte) as url:
                runs: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
                for turn in range(args.runs + 1):  # the first warms up
                    for way in WAYS:
                        result = measure(command(way, f"{url}/{source.name}", source, out), out)
                        print(f"{way}: {result[0]:.2f} s, {result[1]:.0f} MB", file=sys.stderr)
                        if turn:
                            runs[way].append(result)
            print(f"\n{network}:\n")
            print("| command | wall, s | curl -o's time / its own, median of pairs | peak MB |\n|---|---|---|---|")
            for way in WAYS:
                walls = [seconds for seconds, _ in runs[way]]
                ratios = [curl[0] / mine[0] for mine, curl in zip(runs[way], runs["curl -o"], strict=True)]
                spread = f"{statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f})"
                peak = max(peak for _, peak in runs[way])
                print(f"| {way} | {spread} | {statistics.median(ratios):.2f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
