"""A file server on the loopback, with the faults of real ones.

Also `python -m tests.file_server FOLDER [LATENCY [SECONDS_A_MEGABYTE]]`, which prints its address.

It answers GET like static servers do: ranges of one part, ETag, Last-Modified, keep-alive. `Faults`, which a test may
change while the server runs, make it misbehave. With a certificate, it speaks TLS. It does not model HTTP/2, ranges of
several parts, conditional requests, or connections that are lost silently.
"""

import os
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Faults:
    """The faults of a server.

    After ``cut_after`` bytes of a body, the connection is cut, for ``cuts`` responses. The next requests are answered
    with ``statuses``, one each, ``retry_after``, and the body and headers of ``refusal``. A megabyte takes
    ``seconds_a_megabyte``. The next responses are delayed by the seconds in ``stall``, and all of them by ``latency``.
    Each response has the next of ``varying`` headers, as if several servers answered. Without ``total``, a part comes
    without the file's size.
    """

    ranges: bool = True
    etag: bool = True
    last_modified: bool = True
    length: bool = True
    total: bool = True
    cut_after: int = 0
    cuts: int = 0
    resets: bool = False
    statuses: list[int] = field(default_factory=list)
    retry_after: str | None = None
    refusal: tuple[bytes, dict[str, str]] = (b"<html>no</html>", {})
    seconds_a_megabyte: float = 0.0
    stall: list[float] = field(default_factory=list)
    latency: float = 0.0
    redirects: dict[str, str] = field(default_factory=dict)
    needs_authorization: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    varying: Iterator[dict[str, str]] | None = None
    close_after_each: bool = False
    drops_idle: bool = False
    wrong_part: bool = False


class FileServer(ThreadingHTTPServer):
    """Serves the files of ``folder`` by name. ``requests`` are (path, range, headers); ``sent`` counts body bytes."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, certificate: Path | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.scheme = "http"
        if certificate is not None:
            self.scheme, context = "https", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.folder, self.faults = folder, Faults()
        self.requests: list[tuple[str, str | None, dict[str, str]]] = []
        self.sent = 0
        self.connections = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that closed its connection."""

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FileServer
    wbufsize = 1 << 16

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server, faults = self.server, self.server.faults
        asked = self.headers.get("Range")
        with server.lock:
            server.requests.append((self.path, asked, dict(self.headers)))
            status = faults.statuses.pop(0) if faults.statuses else 0
            stall = faults.stall.pop(0) if faults.stall else 0
        if stall or faults.latency:
            time.sleep(stall or faults.latency)
        path = self.path.partition("?")[0]
        if status:
            self._plain(status, {"Retry-After": faults.retry_after} if faults.retry_after else {})
        elif path in faults.redirects:
            self._plain(302, {"Location": faults.redirects[path]})
        elif faults.needs_authorization not in (None, self.headers.get("Authorization")):
            self._plain(401, {})
        elif not os.path.isfile(server.folder / path.rpartition("/")[2]):
            self._plain(404, {})
        else:
            self._file(server.folder / path.rpartition("/")[2], asked)

    def _plain(self, status: int, headers: dict[str, str]) -> None:
        body, others = self.server.faults.refusal
        self.send_response(status)
        for name, value in {**headers, **others, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _file(self, path: Path, asked: str | None) -> None:
        faults = self.server.faults
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            start, end = 0, state.st_size
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "") if faults.ranges else None
            if match and int(match[1]) >= state.st_size:
                return self._plain(416, {"Content-Range": f"bytes */{state.st_size}"})
            if match:
                start, end = int(match[1]), min(end, int(match[2] or end) + 1)
                self.send_response(206)
                shown = start + faults.wrong_part
                self.send_header("Content-Range", f"bytes {shown}-{end - 1}/{state.st_size if faults.total else '*'}")
            else:
                self.send_response(200)
            if faults.length:
                self.send_header("Content-Length", str(end - start))
            if faults.etag:
                self.send_header("ETag", f'"{state.st_mtime_ns:x}-{state.st_size:x}"')
            if faults.last_modified:
                self.send_header("Last-Modified", formatdate(int(state.st_mtime), usegmt=True))
            with self.server.lock:
                varying = next(faults.varying) if faults.varying is not None else {}
            for name, value in {**faults.headers, **varying}.items():
                self.send_header(name, value)
            if faults.close_after_each or not faults.length:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.close_connection |= faults.drops_idle  # without announcing it
            self.end_headers()
            self.wfile.flush()
            self._send(file.fileno(), start, end)
        return None

    def _send(self, fd: int, start: int, end: int) -> None:
        faults, at = self.server.faults, start
        cut = None
        with self.server.lock:
            if faults.cuts and end - start > faults.cut_after:
                faults.cuts -= 1
                cut = start + faults.cut_after
        while at < (end if cut is None else cut):
            size = min((end if cut is None else cut) - at, 1 << 20)
            if faults.seconds_a_megabyte:
                size = min(size, 64 << 10)
                time.sleep(faults.seconds_a_megabyte * size / 1e6)
            if isinstance(self.connection, ssl.SSLSocket):
                data = os.pread(fd, size, at)
                self.connection.sendall(data)
                count = len(data)
            else:
                count = os.sendfile(self.connection.fileno(), fd, at, size)
            if not count:
                break
            at += count
            with self.server.lock:
                self.server.sent += count
        if cut is not None:
            if faults.resets:  # data that was sent and not yet read is lost, too
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True


@contextmanager
def serving(folder: Path, certificate: Path | None = None) -> Iterator[FileServer]:
    with FileServer(folder, certificate) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    with FileServer(Path(sys.argv[1])) as main_server:
        main_server.faults.latency, main_server.faults.seconds_a_megabyte = map(float, (*sys.argv[2:], 0, 0)[:2])
        print(main_server.url, flush=True)
        with suppress(KeyboardInterrupt):
            main_server.serve_forever()
