"""python -m benchmarks.convert [MODEL] [--runs N] [--dir DIR]: streamconv against other ways, one table.

Every way runs as a process of its own, the ways interleaved, the source in the page cache and the
output's folder gone and the machine settled before each run. Peak memory is the largest VmHWM that a process of the way
reached (what wait4 reports; its floor is this small parent's own). The cgroup columns say whether
the way ends inside that much memory, page cache included, where this machine lets us try.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STREAMCONV = "streamconv convert"
WAYS = ("cp; sync", STREAMCONV, "torch.load(mmap) + save_torch_state_dict", "original script's way")
LIMITS_MB = (1024, 64)
# A run's freed pages and blocks are given back in the background (to a virtual machine's host, to
# the disk), for seconds; the next run shall not pay for that.
SETTLE_SECONDS = 4


def command(way: str, source: Path, out: Path) -> list[str]:
    if way == STREAMCONV:
        return [sys.executable, "-m", "streamconv", "convert", str(source), "-o", str(out)]
    if way == "cp; sync":  # the shell's, so that no Python start is counted
        return ["sh", "-c", f"mkdir '{out}' && cp '{source}' '{out}' && sync"]
    return [sys.executable, "-m", "benchmarks.ways", way, str(source), str(out)]


class Cgroup:
    """A memory cgroup of version 1 or 2, where there is one that we may write."""

    def __init__(self, limit: int):
        self.path: Path | None = None
        for parent, limit_file in (
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
            (Path("/sys/fs/cgroup"), "memory.max"),
        ):
            path = parent / f"benchmark-{os.getpid()}"
            try:
                path.mkdir()
            except OSError:
                continue
            if (path / limit_file).exists():
                (path / limit_file).write_text(str(limit))
                self.path = path
                return
            path.rmdir()

    def enter(self) -> None:
        """Move this process in; for a child, before its exec."""
        if self.path is not None:
            (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        if self.path is not None:
            self.path.rmdir()


def measure(way: str, source: Path, out: Path, cgroup: Cgroup | None = None) -> tuple[float, float, int]:
    """Seconds, peak MB and exit code of one run."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    time.sleep(SETTLE_SECONDS)
    start = time.monotonic()
    enter = cgroup.enter if cgroup else None
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command(way, source, out), stdout=quiet, stderr=quiet, preexec_fn=enter)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return time.monotonic() - start, usage.ru_maxrss / 1024, process.returncode


def ends_within(limit_mb: int, way: str, source: Path, out: Path) -> str:
    group = Cgroup(limit_mb << 20)
    try:
        if group.path is None:
            return "not tried"
        seconds, _, code = measure(way, source, out, group)
        return f"yes, {seconds:.1f} s" if code == 0 else "killed" if code in (-9, 137) else f"no, exit {code}"
    finally:
        group.close()


def machine() -> str:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "safetensors")]
    versions = ", ".join([f"Linux {platform.release()}", f"Python {platform.python_version()}", *packages])
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, {versions}"


def parse_arguments(description: str, runs: int) -> argparse.Namespace:
    """Every benchmark's: ``model``, ``runs`` and ``dir``."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("model", nargs="?", default="dinov2_vits14")
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where to put the source and outputs")
    return parser.parse_args()


@contextmanager
def made_source(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """A random checkpoint of the model and a place for outputs, for as long as they are needed."""
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        source = Path(folder, f"{args.model}_pretrain.pth")
        synth = [sys.executable, "-m", "streamconv", "synth", args.model, str(source)]
        subprocess.run(synth, check=True, stdout=sys.stderr)
        yield source, Path(folder, "out")


def main() -> None:
    args = parse_arguments(__doc__, runs=5)
    with made_source(args) as (source, out):
        runs: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
        for turn in range(args.runs + 1):  # the first warms up
            for way in WAYS:
                result = measure(way, source, out)
                print(f"{way}: {result[0]:.2f} s, {result[1]:.0f} MB, exit {result[2]}", file=sys.stderr)
                if turn:
                    runs[way].append(result)
        print(f"{args.model}, {source.stat().st_size:,} bytes; {machine()}")
        print(f"`python -m benchmarks.convert {args.model} --runs {args.runs}`: median (least to most), interleaved\n")
        limits = " | ".join(f"in {mb} MB" for mb in LIMITS_MB)
        print(f"| way | wall, s | of cp; sync, pair by pair | peak MB | {limits} |")
        print("|---|---|---|---|" + "---|" * len(LIMITS_MB))
        for way in WAYS:
            failed = [code for _, _, code in runs[way] if code]
            walls = [seconds for seconds, _, _ in runs[way]]
            ratios = [mine[0] / limit[0] for mine, limit in zip(runs[way], runs["cp; sync"], strict=True)]
            spread = f"{statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f})"
            cells = [
                f"failed, exit {failed[0]}" if failed else spread,
                f"{statistics.median(ratios):.2f}",
                f"{max(peak for _, peak, _ in runs[way]):.0f}",
                *(ends_within(mb, way, source, out) for mb in LIMITS_MB),
            ]
            print(f"| {way} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
