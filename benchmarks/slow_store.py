"""python -m benchmarks.slow_store FOLDER LIMITS: a slow server that can also be written to, as an S3 bucket.

It takes uploads at the rates of `Limits` and forgets the bytes of their parts; small objects are kept in memory. It is
fast, because it checks nothing: no signature, no checksum, no order of parts. A part's ETag is the MD5 that the client
sent. tests/s3_server.py is the server to test correctness with.
"""

import base64
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from benchmarks.slow_server import Handler, let_pass, main

MODIFIED = "Thu, 01 Jan 2026 00:00:00 GMT"
MAX_KEPT_BYTES = 4 << 20


@dataclass
class Objects:
    """The objects of a process, which all its links share; parts by upload: size and ETag by number."""

    sizes: dict[str, tuple[int, str]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, tuple[int, str]]] = field(default_factory=lambda: defaultdict(dict))
    numbers: "count[int]" = field(default_factory=count)
    lock: threading.Lock = field(default_factory=threading.Lock)


class StoreHandler(Handler):
    """One connection to a bucket, whose objects are also the files of the server's folder."""

    objects = Objects()

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query, True).items()}

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def do_GET(self) -> None:
        if "list-type" in self.query:
            self.begin()
            self.answer(200, body=self._listing(self.query["prefix"]).encode())
        elif "uploads" in self.query:
            self.begin()
            self.answer(200, body=b"<ListMultipartUploadsResult/>")
        elif (found := self.objects.sizes.get(self.key)) is not None:
            self.begin()
            body = self.objects.contents.get(self.key, b"") if self.command == "GET" else b""
            self.answer(200, {"ETag": f'"{found[1]}"', "Last-Modified": MODIFIED}, body, found[0])
        else:
            super().do_GET()

    def do_PUT(self) -> None:
        self.begin()
        etag, size = base64.b64decode(self.headers["Content-MD5"]).hex(), int(self.headers["Content-Length"])
        part, left, kept = "partNumber" in self.query, size, b""
        while left:
            piece = min(left, self.piece_bytes)
            let_pass(piece, self.receiving)
            data = self.rfile.read(piece)
            left -= len(data)
            kept += data if size <= MAX_KEPT_BYTES and not part else b""
            if not data:
                raise ConnectionError
        with self.objects.lock:
            self.server.traffic.received += size
            if part:
                self.objects.parts[self.query["uploadId"]][int(self.query["partNumber"])] = size, etag
            else:
                self.objects.sizes[self.key], self.objects.contents[self.key] = (size, etag), kept
        self.answer(200, {"ETag": f'"{etag}"'})

    def do_POST(self) -> None:
        self.begin()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.objects.lock:
            if "uploads" in self.query:
                body = f"<InitiateMultipartUploadResult><UploadId>{next(self.objects.numbers)}</UploadId>"
                self.answer(200, body=f"{body}</InitiateMultipartUploadResult>".encode())
                return
            parts = self.objects.parts.pop(self.query["uploadId"])
            etag = f"{next(self.objects.numbers)}-{len(parts)}"
            self.objects.sizes[self.key] = sum(size for size, _ in parts.values()), etag
        body = f'<CompleteMultipartUploadResult><ETag>"{etag}"</ETag></CompleteMultipartUploadResult>'
        self.answer(200, body=body.encode())

    def do_DELETE(self) -> None:
        self.begin()
        with self.objects.lock:
            self.objects.sizes.pop(self.key, None)
            self.objects.contents.pop(self.key, None)
        self.answer(204)

    def _listing(self, prefix: str) -> str:
        """List the objects directly below a prefix, in one page."""
        with self.objects.lock:
            found = {key: each for key, each in self.objects.sizes.items() if key.startswith(prefix)}
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>{etag}</ETag></Contents>"
            for key, (size, etag) in sorted(found.items())
            if "/" not in key.removeprefix(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"


if __name__ == "__main__":
    main(StoreHandler)
