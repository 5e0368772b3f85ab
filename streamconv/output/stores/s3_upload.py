"""Uploads of one object to S3: in parts of one size, or, if it fits into a part, at once."""

import base64
import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from threading import Event, Lock
from typing import Any

from streamconv.output.stores.part_layout import MAX_PARTS
from streamconv.output.stores.s3_client import S3Client
from streamconv.output.stores.s3_errors import LOST, MISSING
from streamconv.output.stores.store import StoredObject, StoreError, UploadLostError

PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4  # being sent; one more is being filled
_MIB = 1 << 20
# How long to wait for the response to CompleteMultipartUpload: AWS may need minutes for many parts.
COMPLETE_SECONDS = 300.0


def part_bytes_for(size: int) -> int:
    """Return the size of the parts of an object: `PART_BYTES`, or whole MiB if there would be too many of them."""
    return PART_BYTES if size <= MAX_PARTS * PART_BYTES else -(-size // MAX_PARTS // _MIB) * _MIB


@dataclass(frozen=True)
class SentPart:
    """A part that the store has. ``checksums`` are those besides its ETag, by S3's names."""

    etag: str
    checksums: Mapping[str, str] = field(default_factory=dict)

    @property
    def described(self) -> dict[str, str]:
        """The part as CompleteMultipartUpload names it, without its number."""
        return {"ETag": self.etag, **self.checksums}


class SmallUpload:
    """An object that is sent in one request."""

    id, part_bytes, held_bytes, kept_bytes = "", 0, 0, 0

    def __init__(self, client: S3Client, key: str):
        self._client, self._key, self._body, self._stop = client, key, BytesIO(), Event()

    def write(self, data: memoryview) -> None:
        self._body.write(data)

    def complete(self) -> StoredObject:
        size = self._body.tell()
        response = self._client.call(
            "put_object", stop=self._stop, Key=self._key, Body=self._body, ContentMD5=_base64(_md5(self._body))
        )
        return StoredObject(size, plain_etag(response))

    def close(self) -> None:
        self._stop.set()

    def abort(self) -> None:
        self.close()


class PartUpload:
    """A multipart upload. Its parts are filled one after the other, and `PARTS_AT_ONCE` of them are sent at once.

    ``stored`` are the sizes and ETags of the parts that the store holds, by number.
    """

    def __init__(self, client: S3Client, key: str, id: str, part_bytes: int, stored: Mapping[int, tuple[int, str]]):
        self.id, self.part_bytes, self.held_bytes, self.kept_bytes = id, part_bytes, _held_bytes(stored, part_bytes), 0
        self._client, self._key, self._stored, self._size = client, key, stored, 0
        self._body, self._free = BytesIO(), deque[BytesIO]()
        self._sent: list[Future[SentPart]] = []
        self._stop, self._lock = Event(), Lock()
        self._threads = ThreadPoolExecutor(PARTS_AT_ONCE, "upload")

    def write(self, data: memoryview) -> None:
        self._size += len(data)
        while data:
            room = self.part_bytes - self._body.tell()
            self._body.write(data[:room])
            data = data[room:]
            if self._body.tell() == self.part_bytes:
                self._send()

    def complete(self) -> StoredObject:
        if self._body.tell():
            self._send()
        sent = [part.result() for part in self._sent]
        parts = [{"PartNumber": number, **part.described} for number, part in enumerate(sent, 1)]
        try:
            response = self._call(
                "complete_multipart_upload", seconds=COMPLETE_SECONDS, MultipartUpload={"Parts": parts}
            )
        except UploadLostError:
            # Another process may have completed it, or this one, if the response was lost.
            found = find(self._client, self._key)
            if found is None or found != StoredObject(self._size, _etag_of_parts([part.etag for part in sent])):
                raise
            return found
        return StoredObject(self._size, plain_etag(response))

    def close(self) -> None:
        self._stop.set()
        self._threads.shutdown(cancel_futures=True)

    def abort(self) -> None:
        self.close()
        abort(self._client, self._key, self.id)

    def _send(self) -> None:
        """Send the part that is filled. Wait until fewer are in flight; the first failure of one is raised here."""
        self._body.truncate()
        self._add(self._threads.submit(self._send_part, len(self._sent) + 1, self._body))
        self._body = self._free.popleft() if self._free else BytesIO()
        self._body.seek(0)

    def _add(self, part: "Future[SentPart]") -> None:
        self._sent.append(part)
        if len(self._sent) > PARTS_AT_ONCE:
            self._sent[-1 - PARTS_AT_ONCE].result()

    def _send_part(self, number: int, body: BytesIO) -> SentPart:
        """Send a part, unless the store holds it."""
        size, md5 = body.tell(), _md5(body)
        if self._stored.get(number) == (size, md5.hex()):
            with self._lock:
                self.kept_bytes += size
            etag = md5.hex()
        else:
            checksums = {"ContentMD5": _base64(md5), **self._checksums(body)}
            etag = plain_etag(self._call("upload_part", PartNumber=number, Body=body, **checksums))
        sent = SentPart(etag, self._checksums(body))
        self._free.append(body)
        return sent

    def _checksums(self, body: BytesIO) -> dict[str, str]:
        """Return the checksums of a part that the store expects besides the ETag."""
        return {}

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        with losing(self._client, self._key):
            return self._client.call(operation, stop=self._stop, Key=self._key, UploadId=self.id, **arguments)


def find(client: S3Client, key: str) -> StoredObject | None:
    """Return an object's size and ETag, None if it does not exist."""
    try:
        response = client.call("head_object", Key=key)
    except StoreError as error:
        if error.code in MISSING:
            return None
        raise
    return StoredObject(response["ContentLength"], plain_etag(response))


def abort(client: S3Client, key: str, upload: str) -> None:
    """Delete what arrived of an upload. It may not exist any more."""
    with suppress(UploadLostError), losing(client, key):
        client.call("abort_multipart_upload", Key=key, UploadId=upload)


@contextmanager
def losing(client: S3Client, key: str) -> Iterator[None]:
    """Raise `UploadLostError` if the store does not have the upload, or one of its parts, any more."""
    try:
        yield
    except StoreError as error:
        if error.code in LOST:
            raise UploadLostError(
                f"The upload of {client.url_of(key)} was completed or aborted by another process ({error.code})."
            ) from None
        raise


def plain_etag(response: Mapping[str, Any]) -> str:
    return str(response.get("ETag", "")).strip('"')


def _held_bytes(stored: Mapping[int, tuple[int, str]], part_bytes: int) -> int:
    """Return the size of the whole parts that the store holds, up to the first that is missing."""
    return next(number for number in count() if stored.get(number + 1, (0, ""))[0] != part_bytes) * part_bytes


def _etag_of_parts(etags: Sequence[str]) -> str:
    """Return the ETag that S3 gives to an object of these parts; "" if it is encrypted, as its ETags are not MD5s."""
    try:
        return f"{hashlib.md5(b''.join(map(bytes.fromhex, etags)), usedforsecurity=False).hexdigest()}-{len(etags)}"
    except ValueError:
        return ""


def _md5(body: BytesIO) -> bytes:
    with body.getbuffer() as data:
        return hashlib.md5(data, usedforsecurity=False).digest()


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
