"""S3, and stores that speak its protocol, as a `Store`."""

from collections.abc import Iterable, Iterator
from typing import Any

from streamconv.errors import OutputError
from streamconv.files.address import Address
from streamconv.output.stores import s3_upload
from streamconv.output.stores.s3_client import S3Client
from streamconv.output.stores.s3_copy import S3Copier
from streamconv.output.stores.s3_errors import MISSING
from streamconv.output.stores.s3_upload import PartUpload, SmallUpload, losing, part_bytes_for, plain_etag
from streamconv.output.stores.store import StoredObject, StoreError, Upload, UploadLostError

MAX_LISTED = 100_000  # objects directly in a prefix; the largest model has about a thousand


class S3Store:
    """A `Store` below a prefix of a bucket."""

    def __init__(self, address: Address):
        self.address = address
        self._client = S3Client(address)
        self.copier = S3Copier(self._client, self._key, self._stored)

    def list(self, folder: str = "") -> dict[str, StoredObject]:
        prefix = self._key(f"{folder}/" if folder else "")
        found = {}
        for page in self._client.pages("list_objects_v2", "ContinuationToken", Prefix=prefix, Delimiter="/"):
            for each in page.get("Contents", ()):
                found[each["Key"].removeprefix(prefix)] = StoredObject(each["Size"], plain_etag(each))
            if len(found) > MAX_LISTED:
                raise OutputError(f"{self.address} holds more than {MAX_LISTED:,} objects. Choose another URL.")
        return found

    def find(self, name: str) -> StoredObject | None:
        return s3_upload.find(self._client, self._key(name))

    def read(self, name: str) -> bytes | None:
        try:
            data: bytes = self._client.call("get_object", Key=self._key(name))["Body"]
        except StoreError as error:
            if error.code in MISSING:
                return None
            raise
        return data

    def put(self, name: str, data: bytes) -> None:
        upload = SmallUpload(self._client, self._key(name))
        upload.write(memoryview(data))
        upload.complete()

    def delete(self, names: Iterable[str]) -> None:
        for name in names:  # not all at once: their order matters, and some stores cannot
            self._client.call("delete_object", Key=self._key(name))

    def start(self, name: str, size: int) -> Upload:
        part_bytes, key = part_bytes_for(size), self._key(name)
        if size <= part_bytes:
            return SmallUpload(self._client, key)
        upload = self._client.call("create_multipart_upload", Key=key)["UploadId"]
        return PartUpload(self._client, key, upload, part_bytes, {})

    def resume(self, name: str, size: int, upload: str, part_bytes: int) -> Upload:
        if part_bytes != part_bytes_for(size):
            raise UploadLostError(f"The upload of {self._client.url_of(self._key(name))} has parts of another size.")
        return PartUpload(self._client, self._key(name), upload, part_bytes, self._stored(name, upload))

    def uploaded_bytes(self, name: str, upload: str) -> int:
        try:
            return sum(part["Size"] for part in self._parts(name, upload))
        except UploadLostError:
            return 0

    def abort_uploads(self, names: Iterable[str]) -> None:
        keys = {self._key(name) for name in names}
        for page in self._client.pages("list_multipart_uploads", "KeyMarker", "UploadIdMarker", Prefix=self._key("")):
            for each in page.get("Uploads", ()):
                if each["Key"] in keys:
                    s3_upload.abort(self._client, each["Key"], each["UploadId"])

    def _key(self, name: str) -> str:
        return f"{self._client.prefix}/{name}" if self._client.prefix else name

    def _stored(self, name: str, upload: str) -> dict[int, tuple[int, str]]:
        """Return the sizes and ETags of the parts of an upload that arrived; errors as for `_parts`."""
        return {part["PartNumber"]: (part["Size"], plain_etag(part)) for part in self._parts(name, upload)}

    def _parts(self, name: str, upload: str) -> Iterator[dict[str, Any]]:
        """Yield the parts of an upload that arrived.

        Raises:
            UploadLostError
        """
        key = self._key(name)
        with losing(self._client, key):
            for page in self._client.pages("list_parts", "PartNumberMarker", Key=key, UploadId=upload):
                yield from page.get("Parts", ())
