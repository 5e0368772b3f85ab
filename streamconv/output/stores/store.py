"""The interface of an object store: what `StoreOutput` needs from S3, and from every other store.

An object is complete or absent: it appears when its upload is completed.
"""

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from streamconv.errors import OutputError
from streamconv.files.address import Address
from streamconv.files.base import File, FileRef


class StoreError(OutputError):
    """A store refuses a request. ``code`` is the store's name for the reason, such as "NoSuchUpload"."""

    def __init__(self, message: str, code: str = ""):
        self.code = code
        super().__init__(message)


class UploadLostError(OutputError):
    """An upload does not exist any more: it was aborted, it expired, or another process completed it."""


class CannotCopyError(OutputError):
    """The store cannot copy ranges of objects, or does not report their CRC-32s."""


MAX_REASON = 300  # characters of the store's own text in a message


@dataclass(frozen=True)
class StoredObject:
    """A complete object. ``version`` changes with its contents, such as an ETag; empty if the store reports none."""

    size: int
    version: str


class Upload(Protocol):
    """An object that is being written, from its beginning to its end.

    ``id`` and ``part_bytes`` let another process resume it; an empty id means that it cannot. ``held_bytes`` counts the
    bytes from the beginning on that the store holds from an earlier process. ``kept_bytes`` counts those that equal the
    bytes written now, and were not sent again.
    """

    id: str
    part_bytes: int
    held_bytes: int
    kept_bytes: int

    def write(self, data: memoryview) -> None:
        """Append bytes, which are copied.

        Raises:
            UploadLostError, StoreError
        """

    def complete(self) -> StoredObject:
        """Make the object appear; errors as for `write`."""

    def close(self) -> None:
        """Stop sending. What arrived is kept, if the upload can be resumed and was not completed."""

    def abort(self) -> None:
        """Delete what arrived."""


class CopyingUpload(Upload, Protocol):
    """An upload in which the store copies some parts from other objects; see `part_layout`."""

    def copy(self, file: File, start: int, length: int) -> "Future[int]":
        """Append a part with these bytes of a file; the result is their CRC-32.

        Raises:
            CannotCopyError: before the first part has been copied.
            ChangedError: the file is not the one that was opened; also from the result.
            UploadLostError, StoreError: also from the result.
        """

    def end_part(self) -> None:
        """End the part of the bytes that were written last: the next ones belong to another part."""


class Copier(Protocol):
    """Makes a store copy ranges of objects."""

    def can_copy(self, file: FileRef) -> bool:
        """Return whether the store has this file of a source and may be able to copy ranges of it."""

    def part_bytes(self, size: int) -> int:
        """Return the size of the parts that are uploaded, for an object of ``size`` bytes."""

    def start(self, name: str, size: int) -> CopyingUpload:
        """Begin an object of ``size`` bytes."""

    def resume(self, name: str, size: int, upload: str) -> CopyingUpload:
        """Continue an upload; copied parts are copied again.

        Raises:
            UploadLostError: there is no such upload.
        """


class Store(Protocol):
    """The objects below a prefix, by name. ``address`` is the URL of the prefix.

    ``copier`` is None if the store cannot copy ranges of objects.
    """

    @property
    def address(self) -> Address: ...

    @property
    def copier(self) -> Copier | None: ...

    def list(self, folder: str = "") -> dict[str, StoredObject]:
        """Return the objects directly in the prefix, or in a folder in it, by name.

        Raises:
            StoreError
        """

    def find(self, name: str) -> StoredObject | None:
        """Return an object's size and version; None if it does not exist."""

    def read(self, name: str) -> bytes | None:
        """Return the contents of a small object; None if it does not exist."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small object, or replace it."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects one after the other; those that do not exist are ignored."""

    def start(self, name: str, size: int) -> Upload:
        """Begin an object of ``size`` bytes."""

    def resume(self, name: str, size: int, upload: str, part_bytes: int) -> Upload:
        """Continue an upload.

        Raises:
            UploadLostError: there is no such upload.
        """

    def uploaded_bytes(self, name: str, upload: str) -> int:
        """Return how many bytes of an upload that is not complete have arrived; 0 if there is no such upload."""

    def abort_uploads(self, names: Iterable[str]) -> None:
        """Delete what has arrived of uploads of these objects that are not complete."""
