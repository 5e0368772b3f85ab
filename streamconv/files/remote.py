"""A file that is read over a network: range by range, in an announced order, over a connection that may break.

The reader announces its next reads (`RemoteFile.prefetch`). Neighbouring ranges are then requested as one, and
the next few requests are sent while one response is read. Their responses wait in the system's socket buffers, so
the memory of this process depends neither on the size of the file nor on the speed of the network.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Protocol

from streamconv.errors import TruncatedError
from streamconv.files.address import Address
from streamconv.files.base import ByteRange, FileRef
from streamconv.files.retries import Retries
from streamconv.files.versions import ProvedBy
from streamconv.logs import logger

WINDOW_BYTES = 256 << 10  # a small read, as of an index, fetches this many bytes and keeps them
MAX_WINDOWS = 8  # kept at once
REQUEST_BYTES = 8 << 20  # the size of one request: a large tensor takes several, each on its own connection
MAX_IN_FLIGHT = 4  # requests sent and not read yet
GAP_BYTES = 16 << 10  # a smaller gap is read and discarded: a millisecond on most networks, less than a new request
_SKIP_BYTES = 64 << 10

_log = logger(__name__)


class RangeResponse(Protocol):
    """The response to a request for a range; it may not have arrived yet."""

    def readinto(self, buffer: memoryview) -> int:
        """Read at least one byte and return how many; 0 if the connection broke."""

    def close(self) -> None:
        """Release the connection; the rest of the range is not needed."""


@dataclass
class PendingRange:
    """The unread rest of an announced or requested range. ``response`` is None until the request is sent."""

    position: int
    end: int
    response: RangeResponse | None = None

    def close(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None


class RemoteFile(ABC):
    """A `File` on another machine; to be used by one thread at a time.

    Subclasses set ``size`` and send the request for a range. ``proved_by`` is set by those who read the file.
    """

    request_bytes = REQUEST_BYTES
    proved_by: ProvedBy = "version"
    size: int

    def __init__(self, address: Address):
        self.address, self._retries = address, Retries(address)
        self._pending: deque[PendingRange] = deque()
        self._expected: Iterator[ByteRange] = iter(())
        self._windows: dict[int, bytes] = {}

    @abstractmethod
    def _request(self, wanted: ByteRange) -> RangeResponse:
        """Send a request for a range; do not wait for the response, which raises OSError if the connection broke."""

    @property
    def is_open(self) -> bool:
        """Return whether any request has succeeded."""
        return True

    @abstractmethod
    def require_unchanged(self) -> None:
        """Raise `ChangedError` if the file is not the one that was opened."""

    def require_one_version(self) -> None:  # noqa: B027 - only http files can have several
        """Raise `ChangedError` if responses of several versions were accepted; see `ProvedBy`."""

    @property
    @abstractmethod
    def version(self) -> dict[str, str | int | None]:
        """Return what distinguishes this version of the file from others; see `Version`."""

    @property
    def validators(self) -> dict[str, str | int | None]:
        """Return all that the server tells about this version; see `is_same_version`."""
        return self.version

    @cached_property
    def ref(self) -> FileRef:
        """The file's `FileRef`, once it has been opened."""
        return FileRef(self.address, self.size, tuple(sorted(self.version.items())))

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def where(self) -> str:
        return str(self.address)

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Announce the next calls of `read_at`, in order. Other ranges may be read in between."""
        self._drop_pending()
        self._expected = iter(_requests(ranges, self.request_bytes))

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on.

        Raises:
            TruncatedError: the file ends within the range.
            ChangedError: the file is not the one that was opened.
            NetworkError: almost no byte arrived in any attempt of the last two minutes.
            SourceError: the server refuses the request.
        """
        if offset + len(buffer) > self.size:
            raise TruncatedError(f"{self.where} ends at byte {self.size:,}, within its contents: it was cut short.")
        while buffer:
            pending = self._pending_at(offset, len(buffer))
            count = self._read(pending, buffer[: pending.end - pending.position])
            buffer, offset = buffer[count:], offset + count

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes from ``offset`` on; raises what `read_at` raises.

        A small read fetches the `WINDOW_BYTES` around it, for the small reads that usually follow.
        """
        self._send_requests()
        if length <= WINDOW_BYTES and not self._is_in_flight(offset):
            for start, window in self._windows.items():
                if start <= offset and offset + length <= start + len(window):
                    return window[offset - start : offset - start + length]
            start = max(0, min(offset, self.size - WINDOW_BYTES))
            window = self._read_alone(start, min(WINDOW_BYTES, self.size - start))
            self._keep_window(start, window)
            return window[offset - start : offset - start + length]
        return self._read_alone(offset, length)

    def close(self) -> None:
        self._drop_pending()
        self._windows.clear()

    def _keep_window(self, start: int, window: bytes) -> None:
        while len(self._windows) >= MAX_WINDOWS:
            del self._windows[next(iter(self._windows))]
        self._windows[start] = window

    def _read_alone(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_at(offset, memoryview(data))
        return bytes(data)

    def _is_in_flight(self, offset: int) -> bool:
        return any(pending.position <= offset < pending.end for pending in self._pending)

    def _pending_at(self, offset: int, length: int) -> PendingRange:
        """Return a range that continues at ``offset``; the first pending one if reads come in the announced order.

        Pending ranges before it are dropped. If none contains ``offset``, a new one is added.
        """
        self._send_requests()
        while self._is_in_flight(offset):
            pending = self._pending[0]
            if pending.position <= offset < pending.end:
                self._skip_to(offset, pending)
                return pending
            if pending.end - pending.position <= GAP_BYTES:  # a request ended within a gap
                self._skip_to(pending.end, pending)  # so that the connection can be reused
            self._pending.popleft().close()
            self._send_requests()
        pending = PendingRange(offset, min(offset + length, offset + self.request_bytes))
        self._pending.appendleft(pending)
        return pending

    def _skip_to(self, offset: int, pending: PendingRange) -> None:
        while pending.position < offset:
            self._read(pending, memoryview(bytearray(min(_SKIP_BYTES, offset - pending.position))))

    def _send_requests(self) -> None:
        """Send requests for the ranges that were announced next, as many as may be in flight."""
        while self._pending and self._pending[0].position >= self._pending[0].end:
            self._pending.popleft()
        for wanted in islice(self._expected, max(0, MAX_IN_FLIGHT - len(self._pending))):
            pending = PendingRange(wanted.start, wanted.end)
            self._pending.append(pending)
            if self._retries.failures == 0:
                pending.response = self._send(wanted)

    def _send(self, wanted: ByteRange) -> RangeResponse:
        _log.debug("%s: requesting bytes %d to %d", self.address, wanted.start, wanted.end)
        return self._request(wanted)

    def _read(self, pending: PendingRange, buffer: memoryview) -> int:
        """Read at least one byte of ``pending`` and return how many. A broken connection is retried."""
        while True:
            try:
                if pending.response is None:
                    pending.response = self._send(ByteRange(pending.position, pending.end - pending.position))
                count = pending.response.readinto(buffer)
                if not count:
                    raise ConnectionError("the connection was closed")
                break
            except OSError as error:  # a broken connection; our own errors are not among them
                pending.close()
                self._retries.wait(error, pending.position if self.is_open else None)
        pending.position += count
        is_complete = pending.position >= pending.end
        self._retries.received(count, is_complete=is_complete)
        if is_complete:
            pending.close()
        return count

    def _drop_pending(self) -> None:
        while self._pending:
            self._pending.popleft().close()
        self._expected = iter(())


def _requests(ranges: Iterable[ByteRange], max_bytes: int) -> Iterator[ByteRange]:
    """Turn announced ranges into requests: join ranges with no or small gaps between them, cut large ones."""
    start = end = 0
    for each in ranges:
        if not each.length:
            continue
        if start < end and not 0 <= each.start - end <= GAP_BYTES:
            yield from _cut(start, end, max_bytes)
            start = end = 0
        if start == end:
            start = each.start
        end = max(end, each.end)
        while end - start > max_bytes:
            yield ByteRange(start, max_bytes)
            start += max_bytes
    yield from _cut(start, end, max_bytes)


def _cut(start: int, end: int, max_bytes: int) -> Iterator[ByteRange]:
    for at in range(start, end, max_bytes):
        yield ByteRange(at, min(max_bytes, end - at))
