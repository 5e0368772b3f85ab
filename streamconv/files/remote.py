"""A file that is read over a network: by ranges, in the order in which they will be wanted, on a line that breaks.

Who reads says ahead what will be read (`RemoteFile.prefetch`). So neighbouring ranges are asked for as
one, and the next few requests are on their way while one is read: their answers wait in the system's
own buffers, and no memory of this process grows with the size of the file or the speed of the line.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from itertools import islice
from typing import Protocol

from streamconv.errors import NetworkError, TruncatedError, printable
from streamconv.files.address import Address
from streamconv.files.base import ByteRange, FileRef

WINDOW_BYTES = 256 << 10  # of an index, read at once
WINDOWS = 8
REQUEST_BYTES = 8 << 20  # what one request asks for, so that several lines carry a large tensor
MAX_IN_FLIGHT = 4  # requests on their way
GAP_BYTES = 16 << 10  # what is read over sooner than asked around: a millisecond of most lines
_SKIP_BYTES = 64 << 10
# Before each new attempt, without a byte in between; the first is for a line that the server closed meanwhile.
WAITS_SECONDS = (0, 1, 2, 4, 8, 16, 30, 30)
WAITS_AT_FIRST = 3  # of these, for a file that could not be opened yet: the address may be wrong

BROKEN = (OSError, HTTPException)
"""What a line that breaks is told by; tried again. Errors of ours are not."""


class RangeResponse(Protocol):
    """A range on its way here, whose request was sent."""

    def readinto(self, buffer: memoryview) -> int:
        """Some bytes, at least one; 0 where the line broke."""

    def close(self) -> None:
        """No more of it is wanted."""


class RetryNow(OSError):
    """Ask again at once: nothing broke. Whoever raises it sees to it that it does so only so often."""


class RetryLater(OSError):
    """The other side asks to be left alone for ``seconds``."""

    def __init__(self, reason: str, seconds: float | None):
        super().__init__(reason)
        self.seconds = seconds


@dataclass
class PendingRange:
    """What is left of a range that was asked for."""

    position: int
    end: int
    answer: RangeResponse | None = None

    def close(self) -> None:
        if self.answer is not None:
            self.answer.close()
            self.answer = None


class RemoteFile(ABC):
    """A `storage.File` somewhere else; for one thread at a time.

    Subclasses set ``size``, and say how to ask for a range.
    """

    request_bytes = REQUEST_BYTES
    size: int

    def __init__(self, address: Address, notify: Callable[[str], None]):
        self.address, self._notify = address, notify
        self._flows: deque[PendingRange] = deque()
        self._expected: Iterator[ByteRange] = iter(())
        self._windows: dict[int, bytes] = {}
        self._failures = 0  # since the last byte

    @abstractmethod
    def _ask(self, wanted: ByteRange) -> RangeResponse:
        """Send a request."""

    @property
    def is_open(self) -> bool:
        """Whether the other side has answered before."""
        return True

    @abstractmethod
    def require_unchanged(self) -> None:
        """Raise `ChangedError` where it is not as it was opened."""

    @property
    @abstractmethod
    def version(self) -> dict[str, str | int | None]:
        """What tells this version of the file from others, for the manifest of what carries no checksums."""

    @cached_property
    def ref(self) -> FileRef:
        """Valid once the file has been opened."""
        return FileRef(self.address, self.size, tuple(sorted(self.version.items())))

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def where(self) -> str:
        return str(self.address)

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Say what `read_at` will be asked for, in its order. Anything else may be read in between."""
        self._drop_flows()
        self._expected = iter(_requests(ranges, self.request_bytes))

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on.

        Raises:
            TruncatedError: the file ends within the range.
            ChangedError: it is another file now.
            NetworkError: no attempt brought a byte for two minutes.
            SourceError: the other side refuses.
        """
        if offset + len(buffer) > self.size:
            raise TruncatedError(f"{self.where} ends at byte {self.size:,}, within its contents: it was cut short.")
        while buffer:
            flow = self._flow_at(offset, len(buffer))
            count = self._read(flow, buffer[: flow.end - flow.position])
            buffer, offset = buffer[count:], offset + count

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on; errors as `read_at`'s. Small ones come from a window of what is near."""
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
        self._drop_flows()
        self._windows.clear()

    def _keep_window(self, start: int, window: bytes) -> None:
        while len(self._windows) >= WINDOWS:
            del self._windows[next(iter(self._windows))]
        self._windows[start] = window

    def _read_alone(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_at(offset, memoryview(data))
        return bytes(data)

    def _is_in_flight(self, offset: int) -> bool:
        self._send_ahead()
        return any(flow.position <= offset < flow.end for flow in self._flows)

    def _flow_at(self, offset: int, length: int) -> PendingRange:
        """What brings the byte at ``offset`` next: the first flow where that is what was expected."""
        while self._is_in_flight(offset):
            flow = self._flows[0]
            if flow.position <= offset < flow.end:
                return self._skipped(flow, offset)
            if flow.end - flow.position <= GAP_BYTES:
                self._skipped(flow, flow.end)  # it was cut within a gap; a line that is read out can be used again
            self._flows.popleft().close()
        flow = PendingRange(offset, min(offset + length, offset + self.request_bytes))
        self._flows.appendleft(flow)
        return flow

    def _skipped(self, flow: PendingRange, offset: int) -> PendingRange:
        while flow.position < offset:
            self._read(flow, memoryview(bytearray(min(_SKIP_BYTES, offset - flow.position))))
        return flow

    def _send_ahead(self) -> None:
        while self._flows and self._flows[0].position >= self._flows[0].end:
            self._flows.popleft()
        for wanted in islice(self._expected, max(0, MAX_IN_FLIGHT - len(self._flows))):
            flow = PendingRange(wanted.start, wanted.end)
            self._flows.append(flow)
            if self._failures == 0:
                with suppress(*BROKEN):  # it is asked for again when it is wanted, and waited for there
                    flow.answer = self._ask(wanted)

    def _read(self, flow: PendingRange, buffer: memoryview) -> int:
        """Some bytes of ``flow``, however often the line breaks."""
        while True:
            try:
                if flow.answer is None:
                    flow.answer = self._ask(ByteRange(flow.position, flow.end - flow.position))
                count = flow.answer.readinto(buffer)
                if not count:
                    raise ConnectionError("the line was closed")
                break
            except BROKEN as error:
                flow.close()
                self._wait(flow.position, error)
        self._failures = 0
        flow.position += count
        if flow.position >= flow.end:
            flow.close()
        return count

    def _wait(self, position: int, error: Exception) -> None:
        if isinstance(error, RetryNow):
            return
        reason = printable(str(error) or type(error).__name__)
        if self._failures == (len(WAITS_SECONDS) if self.is_open else WAITS_AT_FIRST):
            where = f"at byte {position:,}" if self.is_open else "from the beginning"
            mend = "it goes on where it was" if self.is_open else "check the address, and the network"
            raise NetworkError(
                f"{self.where} cannot be read {where}: {reason} (tried {self._failures + 1} times). "
                f"Run the same command again when the line is back; {mend}."
            ) from error
        seconds: float = WAITS_SECONDS[self._failures]
        if isinstance(error, RetryLater) and error.seconds is not None:
            seconds = max(seconds, min(error.seconds, WAITS_SECONDS[-1]))
        self._failures += 1
        if seconds:
            self._notify(f"{self.where}: {reason}; trying again in {seconds:g} s")
            time.sleep(seconds)

    def _drop_flows(self) -> None:
        while self._flows:
            self._flows.popleft().close()
        self._expected = iter(())


def _requests(ranges: Iterable[ByteRange], max_bytes: int) -> Iterator[ByteRange]:
    """Joins neighbours, and what small gaps part; cuts what is larger than one request."""
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
