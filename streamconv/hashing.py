"""sha256 in a thread of its own, while another one reads, compares and writes."""

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

BUFFER_BYTES, RING_BUFFERS = 1 << 20, 8  # what the hash may be behind: less costs time, more costs memory


class BackgroundHash:
    """Gives out buffers, and hashes what they were filled with; use it in a ``with`` statement.

    Buffers beyond the CPU's cache make every step slower, so there is a ring of small ones.
    """

    def __init__(self) -> None:
        self._ring = deque(memoryview(bytearray(BUFFER_BYTES)) for _ in range(RING_BUFFERS))
        self._pending: deque[Future[None]] = deque()
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "hash")

    def __enter__(self) -> "BackgroundHash":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def next_buffer(self) -> memoryview:
        """A buffer of `BUFFER_BYTES` that no one hashes any more; the one before is given back by `update`."""
        if len(self._pending) == RING_BUFFERS:
            self._pending.popleft().result()
        self._ring.rotate()
        return self._ring[0]

    def update(self, data: memoryview | bytes) -> None:
        """Hash ``data``, which must not change while `RING_BUFFERS` - 1 further buffers are taken."""
        self._pending.append(self._thread.submit(self._digest.update, data))

    def so_far(self) -> "Future[str]":
        """The hexadecimal digest of all that was given so far, when the thread is there."""
        return self._thread.submit(lambda: self._digest.copy().hexdigest())

    def hexdigest(self) -> str:
        """Of all that was given so far, which starts a new one."""
        while self._pending:
            self._pending.popleft().result()
        digest, self._digest = self._digest.hexdigest(), hashlib.sha256()
        return digest
