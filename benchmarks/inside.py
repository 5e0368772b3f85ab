"""python -m benchmarks.inside SOURCE OUT [alone]: where a conversion spends its time, as JSON.

Measures either a conversion, with a timer around each call that reads, checks, writes or syncs, by thread; or,
with "alone", each of these steps by itself, on the same number of bytes.
"""

import fcntl
import hashlib
import json
import mmap
import os
import sys
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CALLS = {
    "read": (os, "preadv"),
    "CRC-32": (zlib, "crc32"),
    "write": (os, "pwrite"),
    "sync": (os, "fdatasync"),
    "last sync": (os, "fsync"),
    "reserve": (os, "posix_fallocate"),
}
PIECE_BYTES, WRITE_BYTES, SYNC_BYTES = 512 << 10, 1 << 20, 32 << 20


class Clock:
    """Accumulates the seconds spent in calls, by thread and step."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def timed(self, step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                thread = threading.current_thread().name.partition("_")[0]
                self.seconds[thread][step] += time.perf_counter() - start

        return timed


class TimedHash:
    """A hash object with a timer."""

    def __init__(self, clock: Clock, digest: Any):
        self._clock, self._digest = clock, digest
        self.update = clock.timed("sha256", digest.update)
        self.hexdigest = digest.hexdigest

    def copy(self) -> "TimedHash":
        return TimedHash(self._clock, self._digest.copy())


def measure_conversion(source: Path, out: Path) -> dict[str, Any]:
    """Wall and CPU seconds of a conversion, and the seconds of each step by thread."""
    import streamconv
    from streamconv.output import hashing

    clock, sha256 = Clock(), hashlib.sha256
    for step, (module, name) in CALLS.items():
        setattr(module, name, clock.timed(step, getattr(module, name)))
    vars(hashing)["hashlib"] = SimpleNamespace(sha256=lambda: TimedHash(clock, sha256()))
    start, cpu = time.perf_counter(), time.process_time()
    streamconv.convert(source, out)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "threads": {thread: dict(steps) for thread, steps in clock.seconds.items()}}


def measure_steps(source: Path, out: Path) -> dict[str, float]:
    """Seconds that each step takes by itself."""
    size = source.stat().st_size
    buffer, fd = memoryview(mmap.mmap(-1, WRITE_BYTES)), os.open(source, os.O_RDONLY)
    found: dict[str, float] = {}

    def measure(step: str, each: Callable[[int], object], count: int) -> None:
        start = time.perf_counter()
        for number in range(count):
            each(number)
        found[step] = time.perf_counter() - start

    pieces, writes = -(-size // PIECE_BYTES), -(-size // WRITE_BYTES)
    measure("read", lambda number: os.preadv(fd, [buffer[:PIECE_BYTES]], number * PIECE_BYTES), pieces)
    measure("CRC-32", lambda _: zlib.crc32(buffer[:PIECE_BYTES]), pieces)
    digest = hashlib.sha256()
    measure("sha256", lambda _: digest.update(buffer), writes)
    target = os.open(out, os.O_RDWR | os.O_CREAT)
    start = time.perf_counter()
    os.posix_fallocate(target, 0, size)
    found["reserve"] = time.perf_counter() - start
    fcntl.fcntl(target, fcntl.F_SETFL, fcntl.fcntl(target, fcntl.F_GETFL) | os.O_DIRECT)

    def write(number: int) -> None:
        os.pwrite(target, buffer, number * WRITE_BYTES)
        if number % (SYNC_BYTES // WRITE_BYTES) == 0:
            os.fdatasync(target)

    measure("write and sync", write, writes)
    os.close(target)
    out.unlink()
    return found


if __name__ == "__main__":
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    print(
        json.dumps(
            {"alone": measure_steps(source, out)}
            if "alone" in sys.argv
            else {"inside": measure_conversion(source, out)}
        )
    )
