"""sha256 in a thread of its own, while another one reads, compares and writes."""

import hashlib
import mmap
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from streamconv.output.files import PAGE_BYTES

BUFFER_BYTES, RING_BUFFERS = 1 << 20, 8  # what the hash may be behind: less costs time, more costs memory


class BackgroundHash:
    """Gives out buffers, and hashes what they were filled with; use it in a ``with`` statement.

    Buffers beyond the CPU's cache make every step slower, so there is a ring of small ones. They are pages of
    memory, one more than what is put there needs, for who writes whole pages.
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
        """A buffer for `BUFFER_BYTES` that no one uses any more; the one before is given back by `update`."""
        if len(self._pending) == RING_BUFFERS:
            self._wait()
        self._ring.rotate()
        return self._ring[0]

    def update(self, data: memoryview | bytes, *uses: "Future[None]") -> None:
        """Hash ``data``, which must not change while `RING_BUFFERS` - 1 further buffers are taken.

        ``uses`` are others' of the same buffer, which is not given out again before they end; what they raise
        is raised by then.
        """
        self._pending.append((self._thread.submit(self._digest.update, data), *uses))

    def _wait(self) -> None:
        for use in self._pending.popleft():
            use.result()

    def so_far(self) -> "Future[str]":
        """The hexadecimal digest of all that was given so far, when the thread is there."""
        return self._thread.submit(lambda: self._digest.copy().hexdigest())

    def hexdigest(self) -> str:
        """Of all that was given so far, which starts a new one."""
        while self._pending:
            self._wait()
        digest, self._digest = self._digest.hexdigest(), hashlib.sha256()
        return digest
