"""Kills a conversion at each of its disk operations, resumes it, and compares the folder with an uninterrupted one.

Run as a process of its own (it forks, and so must be small):
`python -m tests.crash SOURCE PLACE HOW SHARD_SIZE TRIES [DTYPE|none [PARTS]]`.
HOW says what remains on the disk:
    kill     what the process wrote, the last write perhaps by half
    power    what was synced: other bytes are zeros or missing, and a name lasts when its folder was synced
    power-names   the same, but every name lasts, as file systems may have it
With PARTS, each try writes that many parts of a plan, and then finishes the folder.
Prints what went wrong, as JSON. Sizes are scaled down by 2048, so that a small model has many marks.
"""

import fcntl
import json
import mmap
import os
import random
import shutil
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamconv
from streamconv.jobs.options import ConversionOptions
from streamconv.output import contents as file_contents
from streamconv.output import hashing
from streamconv.output import writer as streaming
from streamconv.output.files import PAGE_BYTES
from streamconv.tensors import tiles
from streamconv.verification import bytes as bytes_check
from streamconv.verification import output_files

SCALE = 2048
MAX_REPEATED = (256 << 20) // SCALE
STEPS = ("pwrite", "write", "fsync", "fdatasync", "replace", "ftruncate", "posix_fallocate", "mkdir", "unlink")


class Disk:
    """Counts a process's disk operations, ends it at a given one, and tracks what would survive a power cut."""

    def __init__(self, shadow: Path, source: Path, stop_at: int | None, half: bool):
        self.shadow, self.stop_at, self.half = shadow, stop_at, half
        self.source = os.stat(source).st_ino
        self.counts = mmap.mmap(-1, 16)  # shared with the parent: steps, bytes of the source read
        self.real = {name: getattr(os, name) for name in (*STEPS, "preadv")}
        self.steps = self.read = 0

    def install(self, folder: Path) -> None:
        for path in (folder.parent, *([folder, *folder.iterdir()] if folder.exists() else [])):
            self._keep(path)  # the present contents survive
        for name in STEPS:
            setattr(os, name, self._step(name))
        os.preadv = self._preadv  # type: ignore[assignment]

    def counted(self) -> tuple[int, int]:
        return struct.unpack("qq", self.counts[:])

    def _step(self, name: str) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            self.steps += 1
            self._count()
            if self.steps == self.stop_at:
                if self.half and name in ("pwrite", "write"):
                    half = len(args[1]) // 2
                    is_direct = fcntl.fcntl(args[0], fcntl.F_GETFL) & os.O_DIRECT
                    self.real[name](args[0], args[1][: half - half % PAGE_BYTES if is_direct else half], *args[2:])
                os._exit(9)
            if name in ("fsync", "fdatasync"):
                return self._sync(args[0])
            return self.real[name](*args, **options)

        return step

    def _preadv(self, fd: int, buffers: list[Any], offset: int) -> int:
        count: int = self.real["preadv"](fd, buffers, offset)
        if os.fstat(fd).st_ino == self.source:
            self.read += count
            self._count()
        return count

    def _count(self) -> None:
        self.counts[:] = struct.pack("qq", self.steps, self.read)

    def _sync(self, fd: int) -> None:
        """Replaces the disk's sync: keeps a copy of the present contents."""
        self._keep(Path(f"/proc/self/fd/{fd}"))

    def _keep(self, path: Path) -> None:
        if path.is_dir():
            kind, data = "names", json.dumps({each.name: each.stat().st_ino for each in path.iterdir()}).encode()
        else:
            kind, data = "bytes", path.read_bytes()
        copy = self.shadow / f"{path.stat().st_ino}.{kind}"
        half = copy.with_name(f"{copy.name}.{threading.get_ident()}")
        half.write_bytes(data)
        self.real["replace"](half, copy)  # another thread may end the process meanwhile


def after_power_cut(folder: Path, shadow: Path, every_name: bool) -> None:
    """Reduce the folder to what a disk would keep in a power cut."""
    names = {path.name: path.stat().st_ino for path in folder.iterdir()} if folder.exists() else {}
    sizes = {path.stat().st_ino: path.stat().st_size for path in folder.iterdir()} if folder.exists() else {}
    parent = shadow / f"{folder.parent.stat().st_ino}.names"
    lasts = folder.exists() and parent.exists() and folder.name in json.loads(parent.read_text())
    if not every_name:
        kept = shadow / f"{folder.stat().st_ino}.names" if lasts else None
        names = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    contents = {}
    for name, inode in names.items():
        synced = shadow / f"{inode}.bytes"
        data = synced.read_bytes() if synced.exists() else b""
        contents[name] = data + bytes(max(0, sizes.get(inode, 0) - len(data))) if every_name else data
    shutil.rmtree(folder, ignore_errors=True)
    if lasts or (every_name and names):
        folder.mkdir()
        for name, data in contents.items():
            (folder / name).write_bytes(data)


@dataclass
class Work:
    """What each try does. ``plan`` is a saved plan, to be executed in this number of ``parts``; 0 converts directly."""

    source: Path
    folder: Path
    options: ConversionOptions
    plan: Path
    parts: int

    def do(self) -> None:
        if not self.parts:
            streamconv.convert(self.source, self.folder, self.options)
            return
        for number in range(1, self.parts + 1):
            streamconv.convert_plan(self.plan, self.folder, part=f"{number}/{self.parts}")
        streamconv.finish(self.folder, self.plan)


def convert(work: Work, disk: Disk) -> int:
    """Convert in a forked process. Returns its exit code: 0 converted, 9 killed."""
    child = os.fork()
    if not child:
        try:
            disk.install(work.folder)
            work.do()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def main(source: Path, place: Path, how: str, tries: int, options: ConversionOptions, parts: int) -> dict[str, Any]:
    for module in (hashing, file_contents, bytes_check, output_files):
        module.BUFFER_BYTES = (1 << 20) // SCALE * 2
    file_contents.PIECE_BYTES = tiles.PIECE_BYTES = (512 << 10) // SCALE * 2
    hashing.RING_BUFFERS //= 2  # of buffers, which are scaled by the same factor
    streaming.SYNC_BYTES //= SCALE
    shadow, folder = place / "shadow", place / "out"
    work = Work(source, folder, options, place / "plan.json", parts)
    if parts:
        streamconv.plan(source, options, save=work.plan)

    def fresh(stop_at: int | None = None, half: bool = False) -> Disk:
        shutil.rmtree(shadow, ignore_errors=True)
        shadow.mkdir()
        return Disk(shadow, source, stop_at, half)

    assert not folder.exists()
    whole = fresh()
    assert convert(work, whole) == 0
    wanted = contents(folder)
    steps, read = whole.counted()
    shutil.rmtree(folder)
    choice = random.Random(f"{how} {options.max_shard_size} {parts}")
    points = sorted(choice.sample(range(1, steps + 1), min(tries, steps)))
    wrong: list[str] = []
    kills = resumed_bytes = worst = 0
    for point in points:
        shutil.rmtree(folder, ignore_errors=True)
        done = 0
        # Killed once, and in half of the tries a second time, after it was resumed.
        for stop_at in (point, *([choice.randrange(1, steps)] if choice.random() < 0.5 else [])):
            disk = fresh(stop_at, choice.random() < 0.5)
            code = convert(work, disk)
            kills += code == 9
            done += disk.counted()[1]
            if how != "kill":
                after_power_cut(folder, shadow, how == "power-names")
            for name, data in contents(folder).items():
                if name in wanted and data != wanted[name]:
                    wrong.append(f"step {point}: {name} is not whole")
        disk = fresh()
        code = convert(work, disk)
        if code or contents(folder) != wanted:
            have = contents(folder)
            other = sorted(n for n in have.keys() | wanted.keys() if have.get(n) != wanted.get(n))
            wrong.append(f"step {point}: ended in {code}, and {other} are others")
        repeated = done + disk.counted()[1] - read
        worst = max(worst, repeated)
        resumed_bytes += disk.counted()[1] < read
    return {"wrong": wrong, "kills": kills, "resumed_bytes": resumed_bytes, "repeated": worst, "read": read}


if __name__ == "__main__":
    source, place, how, shard_size, tries, *more = sys.argv[1:]
    dtype, parts = [*more, "none", "0"][:2] if len(more) != 1 else [more[0], "0"]
    options = ConversionOptions(max_shard_size=shard_size, dtype=None if dtype == "none" else dtype)
    found = main(Path(source), Path(place), how, int(tries), options, int(parts))
    print(json.dumps({**found, "max_repeated": MAX_REPEATED}))
