"""An S3 server on the loopback: moto's, with the faults of real ones injected before it, and all requests counted.

What moto does not model, as tried out with version 5.2:
    - Access: any credentials and signatures are accepted, however old, so there is no clock skew, no expired token and
      no bucket that one may not write. Tests inject these refusals.
    - Load: it never throttles, and never answers with 500 or 503 on its own. Tests inject these, too.
    - Damage: it does not compare a body with x-amz-checksum-*. `S3Server` refuses a body that does not match its
      Content-MD5, as real stores do.
    - Copies of parts: it gives no CRC-32 of them, and ignores x-amz-copy-source-if-match. `S3Server` does what AWS
      documents. It computes the CRC-32 from the bytes that moto has stored, so that damage on the way is in it.
    - Checksums of parts: AWS refuses an upload with CRC-32s if a part comes without one, or the list of parts does.
      `S3Server` refuses a part without one.
    - A part of an upload that does not exist is an internal error. `S3Server` answers NoSuchUpload, as real stores do.
    - Lifecycle rules never abort an upload. Nothing is ever inconsistent or slow. Encryption does not change ETags.
    - The regions of buckets, redirects to them, addresses of the form BUCKET.HOST, and TLS.
It does model: parts of at least 5 MiB (EntityTooSmall when the upload is completed), ETags as AWS makes them, listings
in pages, conditional requests (If-Match, If-None-Match), ranges, part copies, and that a completed upload may be
completed again.
"""

import base64
import hashlib
import io
import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

CREDENTIALS = {  # for AWS's libraries; nothing of the user's is read
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_ERROR = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>{}</Message></Error>'
_OPERATIONS = {  # by method and the parameter in the query that tells operations on an object or a bucket apart
    ("PUT", "partNumber"): "UploadPart",
    ("POST", "uploads"): "CreateMultipartUpload",
    ("POST", "uploadId"): "CompleteMultipartUpload",
    ("DELETE", "uploadId"): "AbortMultipartUpload",
    ("GET", "uploadId"): "ListParts",
    ("GET", "uploads"): "ListMultipartUploads",
    ("GET", "list-type"): "ListObjectsV2",
    ("POST", "delete"): "DeleteObjects",
}
_PLAIN = {"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject", "POST": "PostObject"}


@dataclass(frozen=True)
class S3Request:
    """A request that arrived: AWS's name of the operation, the object's key, the body's size in bytes, the range."""

    operation: str
    key: str
    size: int
    part: int = 0
    range: str = ""


@dataclass
class Fault:
    """A fault of the requests of one operation, after ``skip`` more of them, for ``times`` of them.

    With ``code``, they are refused with it and ``status``. With ``cut``, the connection breaks in the middle of the
    body. With ``lost``, they are carried out, and the connection breaks before the answer. With ``hangs``, there is no
    answer until `S3Server.reset`. With ``damages``, a bit of the body changes on the way. ``then`` is called before the
    request is carried out, in a thread of the server.
    """

    operation: str
    skip: int = 0
    times: int = 1
    code: str = ""
    status: int = 500
    cut: bool = False
    lost: bool = False
    hangs: bool = False
    damages: bool = False
    then: Callable[[S3Request], None] | None = None


@dataclass
class S3Server:
    """A running server: ``url`` is its address, ``requests`` what arrived, ``faults`` what is wrong with it now."""

    app: Any
    url: str = ""
    requests: list[S3Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)
    reports_copied_crcs: bool = True

    def reset(self) -> None:
        """Forget requests and faults, and end the requests that hang."""
        self.released.set()
        self.released = threading.Event()
        self.requests, self.faults, self.reports_copied_crcs = [], [], True

    def count(self, *operations: str) -> int:
        """Return how many requests of these operations arrived."""
        return sum(request.operation in operations for request in list(self.requests))

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = _request(environ)
        with self.lock:
            self.requests.append(request)
            fault = self._fault(request.operation)
        if fault is not None and fault.then is not None:
            fault.then(request)
        if fault is not None and fault.hangs:
            self.released.wait(60)
            _reset(environ)
        if fault is not None and fault.cut:
            environ["wsgi.input"].read(request.size // 2)
            _reset(environ)
        if fault is not None and fault.code:
            environ["wsgi.input"].read(request.size)
            return _refuse(start_response, fault.status, fault.code)
        if request.operation in ("PutObject", "UploadPart") and not self._is_sound(environ, request, fault):
            return _refuse(start_response, 400, "BadDigest")
        if request.operation in ("UploadPart", "UploadPartCopy") and not self._has_upload(environ):
            return _refuse(start_response, 404, "NoSuchUpload")
        if request.operation == "UploadPartCopy":
            return self._copy(environ, start_response, fault)
        if fault is not None and fault.lost:
            list(self.app(environ, lambda *args: None))
            _reset(environ)
        return self.app(environ, start_response)  # type: ignore[no-any-return]

    def _fault(self, operation: str) -> Fault | None:
        for fault in self.faults:
            if fault.operation in (operation, "any"):
                if fault.skip:
                    fault.skip -= 1
                elif fault.times:
                    fault.times -= 1
                    return fault
        return None

    def _has_upload(self, environ: dict[str, Any]) -> bool:
        (upload,) = parse_qs(environ["QUERY_STRING"])["uploadId"]
        return upload in Bucket(environ["PATH_INFO"].split("/")[1], self).uploads

    def _copy(
        self, environ: dict[str, Any], start_response: Callable[..., Any], fault: Fault | None
    ) -> Iterable[bytes]:
        """Copy a part, unless its source has changed, and report the CRC-32 of what is stored."""
        backend, query = _backend(), parse_qs(environ["QUERY_STRING"])
        bucket, _, key = unquote(environ["HTTP_X_AMZ_COPY_SOURCE"]).lstrip("/").partition("/")
        expected = environ.get("HTTP_X_AMZ_COPY_SOURCE_IF_MATCH")
        source = backend.get_object(bucket, key)
        if expected is not None and source is not None and source.etag != expected:
            return _refuse(start_response, 412, "PreconditionFailed")
        answer: list[Any] = []
        body = b"".join(self.app(environ, lambda status, headers, *rest: answer.extend((status, headers))))
        upload = backend.get_bucket(unquote(environ["PATH_INFO"]).split("/")[1]).multiparts.get(query["uploadId"][0])
        part = upload and upload.parts.get(int(query["partNumber"][0]))
        if part and fault is not None and fault.damages:
            part.value = bytes([part.value[0] ^ 1]) + part.value[1:]
        if part and self.reports_copied_crcs and upload.metadata.get("x-amz-checksum-algorithm") == "CRC32":
            crc = base64.b64encode(zlib.crc32(part.value).to_bytes(4, "big"))
            end = b"</CopyPartResult>"
            body = body.replace(end, b"<ChecksumCRC32>" + crc + b"</ChecksumCRC32>" + end)
        headers = [(name, value) for name, value in answer[1] if name.lower() != "content-length"]
        start_response(answer[0], [*headers, ("Content-Length", str(len(body)))])
        return [body]

    def _is_sound(self, environ: dict[str, Any], request: S3Request, fault: Fault | None) -> bool:
        """Compare the body with its Content-MD5, as AWS does and moto does not."""
        body = environ["wsgi.input"].read(request.size)
        if fault is not None and fault.damages:
            body = bytes([body[0] ^ 1]) + body[1:]
        environ["wsgi.input"] = io.BytesIO(body)
        if request.operation == "UploadPart" and "HTTP_X_AMZ_CHECKSUM_CRC32" not in environ and _has_crcs(environ):
            return False
        expected = environ.get("HTTP_CONTENT_MD5")
        return expected is None or base64.b64decode(expected) == hashlib.md5(body).digest()


def _backend() -> Any:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


def _has_crcs(environ: dict[str, Any]) -> bool:
    """Return whether the upload that a part belongs to was created with CRC-32s."""
    bucket = unquote(environ["PATH_INFO"]).split("/")[1]
    upload = _backend().get_bucket(bucket).multiparts.get(parse_qs(environ["QUERY_STRING"])["uploadId"][0])
    return upload is not None and upload.metadata.get("x-amz-checksum-algorithm") == "CRC32"


def _request(environ: dict[str, Any]) -> S3Request:
    query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    method, (_, _, key) = environ["REQUEST_METHOD"], unquote(environ["PATH_INFO"]).lstrip("/").partition("/")
    found = (name for (each, parameter), name in _OPERATIONS.items() if each == method and parameter in query)
    operation = next(found, _PLAIN[method] if key else f"{_PLAIN[method]} of a bucket")
    if "HTTP_X_AMZ_COPY_SOURCE" in environ:
        operation = {"UploadPart": "UploadPartCopy", "PutObject": "CopyObject"}[operation]
    size, part = int(environ.get("CONTENT_LENGTH") or 0), int(query.get("partNumber", ["0"])[0])
    return S3Request(
        operation, key, size, part, environ.get("HTTP_RANGE") or environ.get("HTTP_X_AMZ_COPY_SOURCE_RANGE", "")
    )


def _reset(environ: dict[str, Any]) -> None:
    """Break the client's connection; a response that follows goes nowhere."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


def _refuse(start_response: Callable[..., Any], status: int, code: str) -> list[bytes]:
    body = _ERROR.format(code, f"the server's own words about {code}").encode()
    start_response(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


@contextmanager
def running() -> Iterator[S3Server]:
    """Run a server in threads of this process; other processes can use it, too."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log(self, *args: Any) -> None:
            pass

    server = S3Server(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, server, threaded=True, request_handler=Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.reset()
    http.shutdown()
    http.server_close()


@dataclass(frozen=True)
class Bucket:
    """A bucket of a server. Its contents are read from moto itself, past the server."""

    name: str
    server: S3Server

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def create(self) -> None:
        _backend().create_bucket(self.name, "us-east-1")

    def put(self, key: str, data: bytes) -> None:
        _backend().put_object(self.name, key, data)

    def delete(self, key: str) -> None:
        _backend().delete_object(self.name, key)

    @property
    def objects(self) -> dict[str, bytes]:
        """The contents of all objects, by key."""
        return {key: each.value for key, each in _backend().get_bucket(self.name).keys.items()}

    @property
    def uploads(self) -> dict[str, str]:
        """The keys of uploads that are neither completed nor aborted, by id."""
        return {each.id: each.key_name for each in _backend().get_bucket(self.name).multiparts.values()}

    def put_part(self, upload: str, number: int, data: bytes) -> None:
        _backend().upload_part(self.name, upload, number, data)

    def abort(self, upload: str) -> None:
        _backend().abort_multipart_upload(self.name, upload)
