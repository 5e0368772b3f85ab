"""Refuses servers that send headers without end, or almost nothing, such as a byte every few seconds.

A socket's timeout does not catch them, because it restarts with each byte and each "100 Continue". Only the time spent
waiting for the server counts here, not the time in which this process did not read.
"""

import io
from http.client import HTTPResponse
from time import monotonic
from typing import Any

from urllib3 import PoolManager

MAX_HEADER_BYTES = 256 << 10  # including interim responses; a hundred times what real servers send
HEADER_SECONDS = 60.0
WINDOW_SECONDS = 60.0  # the rate of a body is measured over this time
MIN_RATE = 500  # bytes a second of each response; four of them share a link, so a link of 2 kB/s is enough
MIN_STORE_RATE = 2_000  # bytes a second of each of the pieces that fsspec fetches at once
RESPONSE_SECONDS = 120.0  # to find the host, connect, agree on encryption and read the headers


class SlowServerError(OSError):
    """The server sends too slowly, or too many headers. The message continues "its server …"."""


def rate_text(count: int, seconds: float) -> str:
    """Describe how many bytes arrived in a time, and at which rate."""
    return f"{count:,} bytes in {seconds:,.0f} s, {count / max(seconds, 0.001):,.1f} bytes a second"


class _WatchedSocket(io.RawIOBase):
    """Measures the bytes of one response as they arrive. Reading raises `SlowServerError` beyond a limit."""

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
                raise SlowServerError(f"sends headers without end ({rate_text(self._bytes, self._seconds)})")
        elif self._seconds >= WINDOW_SECONDS:
            if self._bytes < MIN_RATE * self._seconds:
                raise SlowServerError(f"sends too slowly: {rate_text(self._bytes, self._seconds)}")
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
