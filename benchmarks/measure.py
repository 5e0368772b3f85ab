"""What one run of a command costs: time, memory, bytes and disk, and the smallest memory that it ends in.

The measuring process stays small, since a child's peak begins with its parent's pages.
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
# As installed programs have it: what is imported was compiled before.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Run:
    """One run of a command. Megabytes are of 10^6 bytes but for a cgroup's, as the system counts them.

    ``peak_mb`` is the largest VmHWM of its processes, which counts pages of mapped files, too; ``own_mb`` leaves these
    out, as far as it was seen by looking every 5 ms. ``read_mb`` came from the disk, and so is 0 where the page
    cache had it. ``disk_mb`` is what it took of the disk at most, beyond the output that it left.
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
        """End what is left in it, too."""
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
    """Looks at a process and its children until it is told to stop: their peak memory, and the least free disk."""

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
    """What /proc says of a process's memory, in MB; nothing where it is gone."""
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
    begun: Path | None = None,
) -> Run:
    """Run a command that writes ``out``, which is deleted before and stays behind; ``begun`` is put in its place.

    Before it, what was written is synced and the machine left alone: a run's freed pages and blocks are given back
    in the background (to a virtual machine's host, to the disk), and the next run shall not pay for that.
    """
    remove(out)
    if begun is not None:
        begun.rename(out)
    os.sync()
    time.sleep(1 + 2 * (last_output[0] > 10**9))
    before = free_bytes(out.parent)
    group = Cgroup(limit_mb << 20) if limit_mb else None
    if group is not None and group.path is None:
        raise SystemExit("no memory cgroup may be made here; leave the search out with --no-search")
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


last_output = [0]  # bytes, of the run before


def smallest_limit(words: Sequence[str], source: Path, out: Path, usual: Run) -> str:
    """The smallest of `LIMITS_MB` in which a command ends well; ``usual`` is a run without a limit.

    What takes ten times as long and a minute counts as not ending. The search begins at the usual peak, and goes
    down as long as it ends, or else up. The source is out of the page cache before each run, so that its pages
    count, too.
    """

    def ends(at: int) -> bool:
        forget_cached(files_in(source))
        found = run(words, out, LIMITS_MB[at], timeout=10 * usual.wall + 60)
        print(f"    in {LIMITS_MB[at]} MB: exit {found.code}, {found.wall:.1f} s", file=sys.stderr)
        return found.code == 0

    at = min(bisect_left(LIMITS_MB, usual.peak_mb), len(LIMITS_MB) - 1)
    if ends(at):
        while at and ends(at - 1):
            at -= 1
        return f"{LIMITS_MB[at]:,}"
    for higher in range(at + 1, len(LIMITS_MB)):
        if ends(higher):
            return f"{LIMITS_MB[higher]:,}"
    return f"above {LIMITS_MB[-1]:,}"


def forget_cached(paths: Iterable[Path]) -> None:
    """Take files out of the page cache; what of them is written must be synced."""
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
    """A random checkpoint of the model, there and on the disk."""
    subprocess.run([sys.executable, "-m", "streamconv", "synth", model, str(path)], check=True, stdout=sys.stderr)
    return path


def parse_arguments(description: str, runs: int) -> argparse.Namespace:
    """A benchmark's of one model: ``model``, ``runs`` and ``dir``."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("model", nargs="?", default="dinov2_vits14")
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where to put the source and outputs")
    return parser.parse_args()


@contextmanager
def made_source(model: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """A random checkpoint of the model and a place for outputs, for as long as they are needed."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        yield synthesize(model, Path(place, f"{model}_pretrain.pth")), Path(place, "out")


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Median, least and most."""
    known = list(values)
    return f"{statistics.median(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def as_json(runs: Iterable[Run]) -> list[dict[str, Any]]:
    return [asdict(each) for each in runs]
