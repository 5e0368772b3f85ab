"""Multipart uploads to S3 in which the store copies some parts from other objects (UploadPartCopy).

The upload is created with CRC-32s: then S3 reports the CRC-32 of each part that it copies, and wants those of the
others (https://docs.aws.amazon.com/AmazonS3/latest/API/API_CopyPartResult.html). Other stores that speak its protocol
may not: the first copied part shows whether they do.
"""

import base64
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from io import BytesIO

from streamconv.errors import ChangedError
from streamconv.files.address import Address
from streamconv.files.base import File, FileRef
from streamconv.files.fsspec import FsspecFile
from streamconv.logs import logger
from streamconv.output.stores.part_layout import uploaded_part_bytes
from streamconv.output.stores.s3_client import S3Client
from streamconv.output.stores.s3_errors import MISSING
from streamconv.output.stores.s3_upload import COMPLETE_SECONDS, PartUpload, SentPart, part_bytes_for, plain_etag
from streamconv.output.stores.store import CannotCopyError, StoreError

CHECKSUM = "ChecksumCRC32"

_log = logger(__name__)


class S3Copier:
    """A `Copier` of one store.

    Args:
        key: Returns an object's key by its name.
        stored: Returns the sizes and ETags of the parts that an upload of a key has.
    """

    def __init__(
        self,
        client: S3Client,
        key: Callable[[str], str],
        stored: Callable[[str, str], Mapping[int, tuple[int, str]]],
    ):
        self._client, self._key, self._stored = client, key, stored
        self.has_copied, self._why_not = False, ""

    def can_copy(self, file: FileRef) -> bool:
        address = file.location
        if self._why_not or not isinstance(address, Address) or address.scheme not in ("s3", "s3a"):
            return False
        return "?" not in address.url and "::" not in address.url  # not a version, nor a file in an archive

    def part_bytes(self, size: int) -> int:
        return uploaded_part_bytes(size, part_bytes_for(size))

    def start(self, name: str, size: int) -> "S3CopyingUpload":
        key = self._key(name)
        upload = self._client.call("create_multipart_upload", Key=key, ChecksumAlgorithm="CRC32")["UploadId"]
        return S3CopyingUpload(self, self._client, key, upload, self.part_bytes(size), {})

    def resume(self, name: str, size: int, upload: str) -> "S3CopyingUpload":
        stored = self._stored(name, upload)
        return S3CopyingUpload(self, self._client, self._key(name), upload, self.part_bytes(size), stored)

    def give_up(self, reason: str) -> CannotCopyError:
        """Stop copying, because of ``reason``; return the error for the file that is being written."""
        if not self._why_not:
            _log.warning("%s: its store cannot copy from the source (%s): reading it", self._client.address, reason)
        self._why_not = reason
        return CannotCopyError(f"{self._client.address} cannot copy from the source: {reason}.")


class S3CopyingUpload(PartUpload):
    """A `CopyingUpload`."""

    def __init__(
        self,
        copier: S3Copier,
        client: S3Client,
        key: str,
        id: str,
        part_bytes: int,
        stored: Mapping[int, tuple[int, str]],
    ):
        super().__init__(client, key, id, part_bytes, stored)
        self._copier, self.held_bytes = copier, 0  # which parts are held is not known before they are made

    def copy(self, file: File, start: int, length: int) -> "Future[int]":
        copied: Future[int] = Future()
        part = self._threads.submit(self._copy_part, len(self._sent) + 1, file, start, length)
        part.add_done_callback(lambda done: _pass_on(done, copied))
        if not self._copier.has_copied:
            part.result()
            self._copier.has_copied = True
        self._size += length
        self._add(part)
        return copied

    def end_part(self) -> None:
        if self._body.tell():
            self._send()

    def _checksums(self, body: BytesIO) -> dict[str, str]:
        with body.getbuffer() as data:
            return {CHECKSUM: base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()}

    def _copy_part(self, number: int, file: File, start: int, length: int) -> SentPart:
        assert isinstance(file, FsspecFile)
        if not file.etag:
            raise self._copier.give_up("the source has no ETag")
        bucket, _, key = file.address.url.partition("://")[2].partition("/")
        try:
            response = self._call(
                "upload_part_copy",
                seconds=COMPLETE_SECONDS,
                PartNumber=number,
                CopySource={"Bucket": bucket, "Key": key},
                CopySourceRange=f"bytes={start}-{start + length - 1}",
                CopySourceIfMatch=file.etag,
            )
        except StoreError as error:
            if error.code in {"PreconditionFailed", "412", *MISSING}:
                raise ChangedError(
                    f"{file.where} was changed while it was copied. Run again from the start."
                ) from error
            if self._copier.has_copied:
                raise
            raise self._copier.give_up(error.code or str(error)) from error
        result = response.get("CopyPartResult", {})
        if CHECKSUM not in result:
            raise self._copier.give_up("it reports no CRC-32 of what it copies")
        return SentPart(plain_etag(result), {CHECKSUM: result[CHECKSUM]})


def _pass_on(part: "Future[SentPart]", copied: "Future[int]") -> None:
    """Set the CRC-32 of a copied part, or its error."""
    if part.cancelled():
        copied.cancel()
    elif error := part.exception():
        copied.set_exception(error)
    else:
        copied.set_result(int.from_bytes(base64.b64decode(part.result().checksums[CHECKSUM]), "big"))
