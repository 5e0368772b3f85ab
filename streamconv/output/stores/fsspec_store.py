"""Every other store that fsspec can write to, as a `Store`: gs://, az:// and others.

A file is written from its beginning to its end. An interrupted file is written again as a whole, because fsspec cannot
continue an upload of another process. On Google Cloud Storage and Azure, an object appears when its file is closed, and
not before. Anywhere else, a file may be visible while it is written, so it has a temporary name, and is renamed. Each
process chooses its own name, because several may write the same file, such as the conversion's record.
"""

import re
import secrets
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from streamconv.errors import OutputError
from streamconv.files.address import Address
from streamconv.output.stores.fsspec_client import FsspecClient
from streamconv.output.stores.store import StoredObject, StoreError, Upload

APPEARS_WHEN_CLOSED = ("gs", "gcs", "az", "abfs", "abfss")
BLOCK_BYTES = 8 << 20
BLOCKS_AT_ONCE = 2  # waiting to be sent; one more is being filled
_INCOMPLETE = ".streamconv-incomplete"
# The names under which stores report what changes with an object's contents; the most reliable first.
_VERSIONS = ("etag", "ETag", "generation", "md5Hash", "content_md5", "last_modified", "mtime", "modified", "created")


class FsspecStore:
    """A `Store` that fsspec reaches."""

    copier = None  # fsspec copies whole objects only

    def __init__(self, address: Address):
        self.address = address
        self._client = FsspecClient(address)

    def list(self, folder: str = "") -> dict[str, StoredObject]:
        def ls() -> dict[str, StoredObject]:
            file_system = self._client.file_system
            file_system.invalidate_cache()
            with suppress(FileNotFoundError):
                files = (each for each in file_system.ls(self._client.path(folder), detail=True))
                return {each["name"].rpartition("/")[2]: _stored(each) for each in files if each["type"] == "file"}
            return {}

        return self._client.repeat(ls)

    def find(self, name: str) -> StoredObject | None:
        def info() -> StoredObject | None:
            self._client.file_system.invalidate_cache()
            with suppress(FileNotFoundError):
                return _stored(self._client.file_system.info(self._client.path(name)))
            return None

        return self._client.repeat(info)

    def read(self, name: str) -> bytes | None:
        def cat() -> bytes | None:
            with suppress(FileNotFoundError):
                return self._client.file_system.cat_file(self._client.path(name))  # type: ignore[no-any-return]
            return None

        return self._client.repeat(cat)

    def put(self, name: str, data: bytes) -> None:
        upload = self.start(name, len(data))
        try:
            upload.write(memoryview(data))
            upload.complete()
        finally:
            upload.close()

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._client.repeat(_delete, self._client, name)

    def start(self, name: str, size: int) -> Upload:
        return _Upload(self, self._client, name)

    def resume(self, name: str, size: int, upload: str, part_bytes: int) -> Upload:
        return self.start(name, size)

    def uploaded_bytes(self, name: str, upload: str) -> int:
        return 0

    def abort_uploads(self, names: Iterable[str]) -> None:
        """Delete the temporary files."""
        wanted = {*names}
        self.delete(name for name in self.list() if _written_under(name) in wanted)


class _Upload:
    """A file that is written in blocks, by the client's thread."""

    id, part_bytes, held_bytes, kept_bytes = "", 0, 0, 0

    def __init__(self, store: FsspecStore, client: FsspecClient, name: str):
        self._store, self._client, self._name, self._block = store, client, name, bytearray()
        self._appears_when_closed = store.address.scheme in APPEARS_WHEN_CLOSED
        self._temporary = _temporary(name)
        self._path = client.path(name if self._appears_when_closed else self._temporary)
        self._file: Any = client.call(self._open)
        self._writes: list[Future[int]] = []

    def write(self, data: memoryview) -> None:
        self._block += data
        if len(self._block) >= BLOCK_BYTES:
            self._send()

    def complete(self) -> StoredObject:
        self._send()
        self._wait(0)
        self._client.result(self._client.submit(self._close), BLOCK_BYTES)
        self._file = None
        found = self._store.find(self._name)
        if found is None:
            raise OutputError(f"{self._store.address}/{self._name} was deleted while it was written.")
        return found

    def close(self) -> None:
        if self._file is not None:
            for write in self._writes:
                write.cancel()
            with suppress(StoreError):  # the first error counts
                self._client.call(self._discard)
            self._file = None

    def abort(self) -> None:
        self.close()

    def _send(self) -> None:
        self._writes.append(self._client.submit(self._file.write, bytes(self._block)))
        self._block.clear()
        self._wait(BLOCKS_AT_ONCE)

    def _wait(self, count: int) -> None:
        """Wait until only ``count`` blocks are left to be sent."""
        while len(self._writes) > count:
            self._client.result(self._writes.pop(0), BLOCK_BYTES)

    # In the client's thread

    def _open(self) -> Any:
        if self._appears_when_closed:
            return self._client.file_system.open(self._path, "wb", block_size=BLOCK_BYTES)
        self._client.file_system.makedirs(self._path.rpartition("/")[0], exist_ok=True)
        return self._client.file_system.open(self._path, "wb")

    def _close(self) -> None:
        self._file.close()
        if not self._appears_when_closed:
            self._client.file_system.mv(self._path, self._client.path(self._name))

    def _discard(self) -> None:
        """Drop a file that is not complete. It must never be closed if that makes it appear."""
        if self._appears_when_closed:
            self._file.closed = True  # or fsspec closes it when it is deleted from memory
            if hasattr(self._file, "discard"):
                self._file.discard()
        else:
            self._file.close()
            _delete(self._client, self._temporary)


def _delete(client: FsspecClient, name: str) -> None:
    with suppress(FileNotFoundError):
        client.file_system.rm_file(client.path(name))


def _temporary(name: str) -> str:
    """Return a name beside ``name`` that no other process uses."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}.{file}.{secrets.token_hex(8)}{_INCOMPLETE}"


def _written_under(name: str) -> str | None:
    """Return the file whose temporary name in the same folder is ``name``."""
    match = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{16}}{re.escape(_INCOMPLETE)}", name)
    return match[1] if match else None


def _stored(info: dict[str, Any]) -> StoredObject:
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    return StoredObject(int(info["size"]), str(version))
