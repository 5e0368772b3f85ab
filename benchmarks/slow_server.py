"""python -m benchmarks.slow_server FOLDER LIMITS: serves files like a distant store, at fixed rates and latency.

LIMITS are those of `Limits`, as JSON. Prints the addresses of its links as JSON. When its input ends, it prints its
`Traffic` and exits. A link stands for the network of one machine, or for one host of a store: each has an address of
its own, and requests that name another host are accepted, so that a link can be the proxy of a worker.

It models the rates and the time until a response begins, but not lost packets, TCP's slow start, TLS or throttling by
errors. Bytes count when they are given to the system. Its socket buffers are small, so that few bytes wait in them.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE_BYTES = 64 << 10  # that a limited connection sends at once
MAX_PIECE_BYTES = 1 << 20
BURST_SECONDS = 0.01  # a bucket that was idle, or whose thread woke up late, catches up this much


@dataclass(frozen=True)
class Limits:
    """The limits of a server. Rates are in bytes per second and direction; 0 stands for no limit.

    ``total_rate`` is that of all links together. ``latency`` is the number of seconds before each response.
    """

    links: int = 1
    link_rate: float = 0
    total_rate: float = 0
    connection_rate: float = 0
    latency: float = 0


@dataclass
class Traffic:
    """What a server did. ``ranges``: the size of each range that was requested. ``cpu`` is in seconds."""

    requests: int = 0
    ranges: list[int] = field(default_factory=list)
    sent: int = 0
    received: int = 0
    cpu: float = 0


class TokenBucket:
    """Lets ``rate`` bytes per second pass, of all threads together."""

    def __init__(self, rate: float):
        self._rate, self._free_at, self._lock = rate, float("-inf"), threading.Lock()

    def reserve(self, count: int, now: float) -> float:
        """Return the seconds from ``now`` until ``count`` more bytes have passed; negative if that is over."""
        if not self._rate:
            return 0
        with self._lock:
            self._free_at = max(self._free_at, now - BURST_SECONDS) + count / self._rate
            return self._free_at - now


def let_pass(count: int, buckets: Sequence[TokenBucket]) -> None:
    """Wait until ``count`` bytes have passed through all buckets."""
    now = time.monotonic()
    seconds = max(bucket.reserve(count, now) for bucket in buckets)
    if seconds > 0:
        time.sleep(seconds)


class SlowServer(ThreadingHTTPServer):
    """One link. ``totals`` are the buckets that all links share, for sent and for received bytes."""

    daemon_threads = True
    request_queue_size = 256
    block_on_close = False

    def __init__(self, folder: Path, limits: Limits, totals: tuple[TokenBucket, TokenBucket], handler: "type[Handler]"):
        super().__init__(("127.0.0.1", 0), handler)
        self.folder, self.limits, self.traffic, self.lock = folder, limits, Traffic(), threading.Lock()
        self.buckets = tuple((total, TokenBucket(limits.link_rate)) for total in totals)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def is_limited(self) -> bool:
        return bool(self.limits.link_rate or self.limits.total_rate or self.limits.connection_rate)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that closed its connection."""


class Handler(BaseHTTPRequestHandler):
    """One connection: sends files whole or by ranges."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: SlowServer

    def setup(self) -> None:
        rate = self.server.limits.connection_rate
        sending, receiving = self.server.buckets
        self.sending, self.receiving = (*sending, TokenBucket(rate)), (*receiving, TokenBucket(rate))
        self.piece_bytes = MAX_PIECE_BYTES
        if self.server.is_limited:
            self.piece_bytes = PIECE_BYTES
            # The system would buffer megabytes that have not passed the network yet.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE_BYTES)
        super().setup()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def begin(self) -> None:
        """Count a request, and wait for the latency."""
        with self.server.lock:
            self.server.traffic.requests += 1
        time.sleep(self.server.limits.latency)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.begin()
        path = self.server.folder / self.path.partition("?")[0].rpartition("/")[2]
        if not path.is_file():
            self.answer(404)
            return
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            start, end, status = 0, state.st_size, 200
            headers = {"ETag": f'"{state.st_mtime_ns:x}"', "Last-Modified": formatdate(state.st_mtime, usegmt=True)}
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end, status = int(match[1]), min(end, int(match[2] or end) + 1), 206
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{state.st_size}"
                with self.server.lock:
                    self.server.traffic.ranges.append(end - start)
            self.answer(status, headers, length=end - start)
            while start < end and self.command == "GET":
                size = min(end - start, self.piece_bytes)
                let_pass(size, self.sending)
                start += (sent := os.sendfile(self.connection.fileno(), file.fileno(), start, size))
                with self.server.lock:
                    self.server.traffic.sent += sent

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", length: int = 0) -> None:
        """Send a response with ``body``, or its beginning if ``length`` bytes follow."""
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(length or len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def start_links(folder: Path, limits: Limits, handler: type[Handler] = Handler) -> list[SlowServer]:
    """Serve ``folder`` in threads; the servers are to be closed by `shutdown`."""
    totals = TokenBucket(limits.total_rate), TokenBucket(limits.total_rate)
    links = [SlowServer(folder, limits, totals, handler) for _ in range(limits.links)]
    for link in links:
        threading.Thread(target=link.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return links


def main(handler: type[Handler] = Handler) -> None:
    links = start_links(Path(sys.argv[1]), Limits(**json.loads(sys.argv[2])), handler)
    print(json.dumps([link.url for link in links]), flush=True)
    sys.stdin.read()
    total = Traffic(cpu=time.process_time())
    for link in links:
        total.requests += link.traffic.requests
        total.ranges += link.traffic.ranges
        total.sent += link.traffic.sent
        total.received += link.traffic.received
    print(json.dumps(asdict(total)), flush=True)
    os._exit(0)  # without waiting for connections


if __name__ == "__main__":
    main()
