"""sha256 in a thread of its own, while another thread reads, compares and writes."""

import hashlib
import mmap
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from streamconv.output.files import PAGE_BYTES

BUFFER_BYTES, RING_BUFFERS = 1 << 20, 8
"""The distance by which hashing may lag behind reading: less stalls the reader, more takes more memory."""


class BackgroundHash:
    """Lends buffers, and hashes the data that they are filled with; use it in a ``with`` statement.

    Buffers that do not fit into the CPU's cache make every step slower, so there is a ring of small ones. They consist
    of pages of memory, one more than `BUFFER_BYTES` need, so that whole pages can be written from them.
    """

    def __init__(self) -> None:
        size = BUFFER_BYTES + PAGE_BYTES
        self._ring = deque(
            memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) for _ in range(RING_BUFFERS)
        )
        self._pending: deque[tuple[Future[Any], ...]] = deque()
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "hash")

    def __enter__(self) -> "BackgroundHash":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def next_buffer(self) -> memoryview:
        """Return a buffer for `BUFFER_BYTES` that is not used any more; `update` gives the previous one back."""
        if len(self._pending) == RING_BUFFERS:
            self._wait()
        self._ring.rotate()
        return self._ring[0]

    def update(self, data: memoryview | bytes, *uses: "Future[None]") -> None:
        """Hash ``data``, which must not change while `RING_BUFFERS` - 1 further buffers are taken.

        ``uses`` are other uses of the same buffer: it is not lent again before they end, and their exceptions are
        raised then at the latest.
        """
        self._pending.append((self._thread.submit(self._digest.update, data), *uses))

    def _wait(self) -> None:
        for use in self._pending.popleft():
            use.result()

    def so_far(self) -> "Future[str]":
        """Return the hexadecimal digest of all data given so far, as soon as the thread has hashed it."""
        return self._thread.submit(lambda: self._digest.copy().hexdigest())

    def hexdigest(self) -> str:
        """Return the hexadecimal digest of all data given since the last call."""
        while self._pending:
            self._wait()
        digest, self._digest = self._digest.hexdigest(), hashlib.sha256()
        return digest
