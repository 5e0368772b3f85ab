"""Refuses servers that send without end, or almost nothing: header by header, or a byte every few seconds.

A timeout of the socket alone does not: each byte, and each "100 Continue", starts it again. What counts here is the
time spent waiting, not the time in which nobody read the response.
"""

import io
from http.client import HTTPResponse
from time import monotonic
from typing import Any

from urllib3 import PoolManager

MAX_HEADER_BYTES = 256 << 10  # with the informational responses before it; a hundred times those of real servers
HEADER_SECONDS = 60.0
WINDOW_SECONDS = 60.0  # in which a body must arrive at this rate
MIN_RATE = 500  # bytes a second; four responses share a link, so this suits one of 2 kB/s
MIN_STORE_RATE = 2_000  # bytes a second of each of the pieces that fsspec fetches at once
RESPONSE_SECONDS = 120.0  # to find the host, connect, agree on encryption and read the headers


class SlowServerError(OSError):
    """The server sends too little, or too much before its response. The message is the end of a sentence."""


def in_time(count: int, seconds: float) -> str:
    return f"{count:,} bytes in {seconds:,.0f} s, {count / max(seconds, 0.001):,.1f} bytes a second"


class _WatchedSocket(io.RawIOBase):
    """The bytes of one response, as they arrive. Reading raises `SlowServerError`."""

    def __init__(self, raw: io.RawIOBase):
        self._raw, self._bytes, self._seconds, self.reads_headers = raw, 0, 0.0, True

    def restart(self, *, reads_headers: bool) -> None:
        self._bytes, self._seconds, self.reads_headers = 0, 0.0, reads_headers

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def readinto(self, buffer: Any) -> int | None:
        started = monotonic()
        count: int = self._raw.readinto(buffer)
        self._seconds += monotonic() - started
        self._bytes += count
        if self.reads_headers:
            if self._bytes > MAX_HEADER_BYTES or self._seconds > HEADER_SECONDS:
                raise SlowServerError(f"sends headers without end ({in_time(self._bytes, self._seconds)})")
        elif self._seconds >= WINDOW_SECONDS:
            if self._bytes < MIN_RATE * self._seconds:
                raise SlowServerError(f"sends too slowly: {in_time(self._bytes, self._seconds)}")
            self.restart(reads_headers=False)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class WatchedResponse(HTTPResponse):
    """A response whose headers, body and trailers have limits."""

    def __init__(self, sock: Any, *args: Any, **options: Any):
        super().__init__(sock, *args, **options)
        self._watched = _WatchedSocket(self.fp.detach())
        self.fp = io.BufferedReader(self._watched)

    def begin(self) -> None:
        super().begin()
        while 100 < self.status < 200 and self.status != 101:  # such as 103 Early Hints; http.client skips only 100
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()
        self._watched.restart(reads_headers=False)

    def _read_and_discard_trailer(self) -> None:
        self._watched.restart(reads_headers=True)
        super()._read_and_discard_trailer()  # type: ignore[misc]


def watch_responses(manager: PoolManager) -> None:
    """Make the responses of all connections of a manager `WatchedResponse`."""
    pools: dict[str, Any] = {}
    pool: Any
    for scheme, pool in manager.pool_classes_by_scheme.items():
        connection = type("WatchedConnection", (pool.ConnectionCls,), {"response_class": WatchedResponse})
        pools[scheme] = type(pool.__name__, (pool,), {"ConnectionCls": connection})
    manager.pool_classes_by_scheme = pools
