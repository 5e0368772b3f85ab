"""Outputs in every other store that fsspec can write to: gs://, az:// and others.

A file is written from its beginning to its end. It is resumed as a whole: fsspec has no way to continue an upload of
another process. On Google Cloud Storage and Azure, an object appears when its file is closed, and not before. Anywhere
else, a file may be visible while it is written, so it has a temporary name, and is renamed.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from streamconv.display import printable, shortened
from streamconv.errors import OutputError, StreamconvError
from streamconv.files import retries, slow
from streamconv.files.address import Address
from streamconv.logs import logger
from streamconv.output.store import StoredObject, StoreError, Upload
from streamconv.output.store_output import StoreOutput
from streamconv.redaction import redacted

APPEARS_WHEN_CLOSED = ("gs", "gcs", "az", "abfs", "abfss")
BLOCK_BYTES = 8 << 20
MAX_REASON = 300  # characters of the store's own text
BLOCKS_AT_ONCE = 2  # that wait to be sent; one more is being filled
# Under these names stores report what changes with the contents of an object; the best first.
_VERSIONS = ("etag", "ETag", "generation", "md5Hash", "content_md5", "last_modified", "mtime", "modified", "created")

_log = logger(__name__)

Result = TypeVar("Result")


class FsspecOutput(StoreOutput):
    """A `SharedOutput` in a store that fsspec can write to."""

    def __init__(self, address: Address):
        super().__init__(FsspecStore(address))


class FsspecStore:
    """A `Store` that fsspec reaches. Its calls run one at a time, in a thread of their own."""

    def __init__(self, address: Address):
        self.address = address
        self._threads = ThreadPoolExecutor(1, "fsspec")
        self._file_system, self._root = _file_system(address)
        self._appears_when_closed = address.scheme in APPEARS_WHEN_CLOSED

    def list(self, folder: str = "") -> dict[str, StoredObject]:
        def ls() -> list[dict[str, Any]]:
            self._file_system.invalidate_cache()
            try:
                return self._file_system.ls(self._path(folder), detail=True)  # type: ignore[no-any-return]
            except FileNotFoundError:
                return []

        files = (each for each in self._repeated(ls) if each["type"] == "file")
        return {each["name"].rpartition("/")[2]: _stored(each) for each in files}

    def find(self, name: str) -> StoredObject | None:
        def info() -> StoredObject | None:
            self._file_system.invalidate_cache()
            try:
                return _stored(self._file_system.info(self._path(name)))
            except FileNotFoundError:
                return None

        return self._repeated(info)

    def read(self, name: str) -> bytes | None:
        def cat() -> bytes | None:
            try:
                return self._file_system.cat_file(self._path(name))  # type: ignore[no-any-return]
            except FileNotFoundError:
                return None

        return self._repeated(cat)

    def put(self, name: str, data: bytes) -> None:
        upload = self.start(name, len(data))
        try:
            upload.write(memoryview(data))
            upload.complete()
        finally:
            upload.close()

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._repeated(partial(self._delete, name))

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._file_system.rm_file(self._path(name))

    def start(self, name: str, size: int) -> Upload:
        return _FsspecUpload(self, name)

    def resume(self, name: str, size: int, upload: str, part_bytes: int) -> Upload:
        return self.start(name, size)

    def uploaded_bytes(self, name: str, upload: str) -> int:
        return 0

    def abort_uploads(self, names: Iterable[str]) -> None:
        """Delete temporary files."""
        wanted = {_temporary(name) for name in names}
        self.delete(name for name in self.list() if name in wanted)

    def open(self, name: str) -> Any:
        """Open a file to write to, under its temporary name if it would be visible at once."""
        if self._appears_when_closed:
            return self._file_system.open(self._path(name), "wb", block_size=BLOCK_BYTES)
        path = self._path(_temporary(name))
        self._file_system.makedirs(path.rpartition("/")[0], exist_ok=True)
        return self._file_system.open(path, "wb")

    def close(self, file: Any, name: str) -> None:
        """Make a file that is complete appear."""
        file.close()
        if not self._appears_when_closed:
            self._file_system.mv(self._path(_temporary(name)), self._path(name))

    def discard(self, file: Any, name: str) -> None:
        """Drop a file that is not complete. It must never be closed, which would make it appear."""
        if self._appears_when_closed:
            file.closed = True  # or fsspec closes it when it is deleted from memory
            if hasattr(file, "discard"):
                file.discard()
            return
        file.close()
        self._delete(_temporary(name))

    def submit(self, function: Callable[..., Result], *args: object) -> "Future[Result]":
        return self._threads.submit(function, *args)

    def result(self, future: "Future[Result]", length: int) -> Result:
        """Return a call's result, which sends ``length`` bytes.

        Raises:
            StoreError: it failed, or takes longer than at `slow.MIN_STORE_RATE`.
        """
        seconds = slow.RESPONSE_SECONDS + length / slow.MIN_STORE_RATE
        if not wait([future], seconds).done:
            raise StoreError(
                f"{self.address} cannot be written: its store did not respond within {seconds:,.0f} s. Check the "
                "network, and run the same command again; complete files are kept."
            )
        try:
            return future.result()
        except StreamconvError:
            raise
        except Exception as error:  # each store's package has its own exceptions
            raise self._explained(error) from None

    def _repeated(self, function: Callable[[], Result]) -> Result:
        """Call a function that may be called again if it fails."""
        for pause in retries.RETRY_WAITS_SECONDS[: retries.RETRIES_BEFORE_OPEN]:
            try:
                return self.result(self.submit(function), 0)
            except StoreError as error:
                if not error.code:
                    raise
                _log.warning("%s Trying again in %g s.", error, pause)
            time.sleep(pause)
        return self.result(self.submit(function), 0)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _explained(self, error: Exception) -> StoreError:
        name = type(error).__name__
        reason = shortened(printable(redacted(f"{name}: {error}", self.address.secrets)), MAX_REASON)
        if isinstance(error, NotImplementedError):
            return StoreError(
                f"{self.address} cannot be written: fsspec cannot write to {self.address.scheme}:// URLs."
            )
        if isinstance(error, PermissionError):
            return StoreError(f"{self.address} cannot be written: {reason}. Check your credentials and their rights.")
        if isinstance(error, FileNotFoundError):
            return StoreError(f"{self.address} cannot be written: {reason}. Create the bucket, or check the URL.")
        advice = "Check the URL, the network and your credentials, and run the same command again."
        return StoreError(f"{self.address} cannot be written: {reason}. {advice}", name)


class _FsspecUpload:
    """A file that is written in blocks by the store's thread."""

    id, part_bytes, held_bytes, kept_bytes = "", 0, 0, 0

    def __init__(self, store: FsspecStore, name: str):
        self._store, self._name, self._block = store, name, bytearray()
        self._file: Any = store.result(store.submit(store.open, name), 0)
        self._writes: list[Future[int]] = []

    def write(self, data: memoryview) -> None:
        self._block += data
        if len(self._block) >= BLOCK_BYTES:
            self._send()

    def complete(self) -> StoredObject:
        self._send()
        self._wait(0)
        self._store.result(self._store.submit(self._store.close, self._file, self._name), BLOCK_BYTES)
        self._file = None
        found = self._store.find(self._name)
        if found is None:
            raise OutputError(f"{self._store.address}/{self._name} was deleted while it was written.")
        return found

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            for write in self._writes:
                write.cancel()
            with suppress(StoreError):  # the first error counts
                self._store.result(self._store.submit(self._store.discard, file, self._name), 0)

    def abort(self) -> None:
        self.close()

    def _send(self) -> None:
        self._writes.append(self._store.submit(self._file.write, bytes(self._block)))
        self._block.clear()
        self._wait(BLOCKS_AT_ONCE)

    def _wait(self, count: int) -> None:
        """Wait until only ``count`` blocks are left to be sent."""
        while len(self._writes) > count:
            self._store.result(self._writes.pop(0), BLOCK_BYTES)


def _temporary(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}.{file}.streamconv-incomplete"


def _stored(info: dict[str, Any]) -> StoredObject:
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    return StoredObject(int(info["size"]), str(version))


def _file_system(address: Address) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        file_system, root = url_to_fs(address.url)
    except Exception as error:  # each store's package has its own exceptions
        reason = printable(redacted(str(error), address.secrets))
        raise OutputError(f"{address} cannot be written: {reason}.") from None
    return file_system, str(root).rstrip("/")
