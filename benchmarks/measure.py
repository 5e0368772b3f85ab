"""Measures a run of a command: time, memory, disk I/O and disk space, and the smallest memory limit that it needs.

The measuring process stays small, because a child's peak memory includes its parent's pages at the fork.
"""

import argparse
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

LIMITS_MB = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288,
             16384, 20480)  # fmt: skip
# Like an installed program: modules are loaded from compiled files.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Run:
    """One run of a command. A megabyte is 10^6 bytes, except in the limits of a cgroup (2^20).

    ``peak_mb`` is the largest VmHWM of its processes, which includes pages of mapped files. ``own_mb`` excludes these;
    it is sampled every 5 ms. ``read_mb`` counts reads from the disk, not from the page cache.
    ``disk_mb`` is the peak of the disk space used in addition to the output.
    """

    code: int
    wall: float
    cpu: float
    peak_mb: float
    own_mb: float
    read_mb: float
    written_mb: float
    disk_mb: float


class Cgroup:
    """A memory cgroup, version 1 or 2. ``path`` is None if this process may not create one."""

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
        """Move this process into the group; called in a child before its exec."""
        if self.path is not None:
            (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        """Delete the group, and kill the processes that are left in it."""
        for _ in range(100):
            with suppress(OSError):
                if self.path is not None:
                    self.path.rmdir()
                return
            for pid in (self.path / "cgroup.procs").read_text().split() if self.path is not None else ():
                with suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)


class _Watch(threading.Thread):
    """Samples a process and its children until `stop`: their peak memory, and the minimum of free disk space."""

    def __init__(self, pid: int, folder: Path):
        super().__init__(daemon=True)
        self._pid, self._folder, self._stopped = pid, folder, threading.Event()
        self.peak_mb, self.own_mb, self.least_free = 0.0, 0.0, free_bytes(folder)

    def run(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self.least_free = min(self.least_free, free_bytes(self._folder))
            for pid in _with_children(self._pid):
                sizes = memory_of(pid)
                self.peak_mb = max(self.peak_mb, sizes.get("VmHWM", 0))
                self.own_mb = max(self.own_mb, sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def free_bytes(folder: Path) -> int:
    state = os.statvfs(folder)
    return state.f_bfree * state.f_frsize


def memory_of(pid: int) -> dict[str, float]:
    """A process's memory in MB, with the names of /proc/PID/status; empty if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines if line.endswith(" kB")}


def _with_children(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _with_children(int(child))


def run(
    words: Sequence[str],
    out: Path,
    limit_mb: int | None = None,
    timeout: float | None = None,
    unfinished: Path | None = None,
) -> Run:
    """Run a command that writes ``out``. An earlier ``out`` is deleted, and replaced by ``unfinished`` if given.

    Before the run, everything is synced and a pause is made: the previous run's pages and blocks are freed in the
    background (to a virtual machine's host, on the disk), which the next run should not pay for.
    """
    remove(out)
    if unfinished is not None:
        unfinished.rename(out)
    os.sync()
    time.sleep(1 + 2 * (last_output[0] > 10**9))
    before = free_bytes(out.parent)
    group = Cgroup(limit_mb << 20) if limit_mb else None
    if group is not None and group.path is None:
        raise SystemExit("This process may not create a memory cgroup. Skip the search with --no-search.")
    with ExitStack() as stack:
        if group is not None:
            stack.callback(group.close)
        log = stack.enter_context(tempfile.TemporaryFile())
        start = time.monotonic()
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=group.enter if group else None,
            start_new_session=True,
            env=ENVIRONMENT,
        )
        watch = _Watch(process.pid, out.parent)
        watch.start()
        timer = threading.Timer(timeout or 3600, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        wall = time.monotonic() - start
        watch.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode and limit_mb is None and process.returncode != -9:
            log.seek(0)
            print(log.read().decode(errors="replace")[-2000:], file=sys.stderr)
    last_output[0] = size = size_on_disk(out)
    return Run(
        code=process.returncode,
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime,
        peak_mb=watch.peak_mb,
        own_mb=watch.own_mb,
        read_mb=usage.ru_inblock * 512 / 1e6,
        written_mb=usage.ru_oublock * 512 / 1e6,
        disk_mb=max(0, before - watch.least_free - size) / 1e6,
    )


last_output = [0]  # bytes written by the previous run


def smallest_limit(words: Sequence[str], source: Path, out: Path, usual: Run) -> str:
    """Find the smallest of `LIMITS_MB` in which a command succeeds; ``usual`` is a run without a limit.

    A run that takes longer than ten times the usual and a minute counts as failed. The search begins at the usual
    peak; it goes down as long as runs succeed, or else up. The source is dropped from the page cache before each
    run, so that its pages count, too.
    """

    def succeeds(at: int) -> bool:
        forget_cached(files_in(source))
        found = run(words, out, LIMITS_MB[at], timeout=10 * usual.wall + 60)
        print(f"    in {LIMITS_MB[at]} MB: exit {found.code}, {found.wall:.1f} s", file=sys.stderr)
        return found.code == 0

    at = min(bisect_left(LIMITS_MB, usual.peak_mb), len(LIMITS_MB) - 1)
    if succeeds(at):
        while at and succeeds(at - 1):
            at -= 1
        return f"{LIMITS_MB[at]:,}"
    for higher in range(at + 1, len(LIMITS_MB)):
        if succeeds(higher):
            return f"{LIMITS_MB[higher]:,}"
    return f"above {LIMITS_MB[-1]:,}"


def forget_cached(paths: Iterable[Path]) -> None:
    """Drop files from the page cache. Data that was not synced stays in it."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def files_in(path: Path) -> list[Path]:
    return [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path] * path.exists()


def size_on_disk(path: Path) -> int:
    return sum(each.stat().st_blocks * 512 for each in files_in(path))


def machine() -> str:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Linux {platform.release()}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "safetensors", "huggingface_hub", "mergekit"):
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, {', '.join(versions)}"


def synthesize(model: str, path: Path) -> Path:
    """Write a random checkpoint of the model, and sync it."""
    subprocess.run([sys.executable, "-m", "streamconv", "synth", model, str(path)], check=True, stdout=sys.stderr)
    return path


def parse_arguments(description: str, runs: int) -> argparse.Namespace:
    """Parse the arguments of a benchmark with one model: ``model``, ``runs`` and ``dir``."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("model", nargs="?", default="dinov2_vits14")
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="folder for the source and outputs")
    return parser.parse_args()


@contextmanager
def made_source(model: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Make a temporary random checkpoint of the model, and a temporary path for outputs."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        yield synthesize(model, Path(place, f"{model}_pretrain.pth")), Path(place, "out")


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Median, minimum and maximum."""
    known = list(values)
    return f"{statistics.median(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def as_json(runs: Iterable[Run]) -> list[dict[str, Any]]:
    return [asdict(each) for each in runs]
