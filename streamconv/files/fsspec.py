"""Files that fsspec reaches: s3://, gs://, az:// and every other scheme that it has a package for.

These packages handle a store's protocol and credentials. Which ranges are requested and when, and what is retried,
is the same as over http: see `remote`.
"""

import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import date
from hashlib import sha256
from typing import Any, TypeVar

from streamconv.display import printable
from streamconv.errors import (
    ChangedError,
    NetworkError,
    RefusedError,
    SourceError,
    SourceMissingError,
    StoreReadError,
    StreamconvError,
    UsageError,
)
from streamconv.files import retries, slow
from streamconv.files.address import Address
from streamconv.files.base import UNVERSIONED, ByteRange
from streamconv.files.remote import MAX_IN_FLIGHT, RemoteFile
from streamconv.logs import logger
from streamconv.redaction import redacted

_log = logger(__name__)

Result = TypeVar("Result")

# The names under which packages report what changes with the contents: ETag, generation, LastModified, mtime, …
_IDENTIFYING = re.compile(
    "etag|md5|crc|sha|hash|digest|ch(ec)?ksum|generation|version|rev|modif|mtime|created|updated|date|hex|blob", re.I
)


class FsspecFile(RemoteFile):
    """A file in a store. Its version is whatever identifies its contents to the store: a hash, a version or a time.

    fsspec's own key (``ukey``) is not one: for a file at an http URL it never changes, and for a file in an archive it
    differs in each process.

    Raises:
        UsageError: fsspec does not know the scheme, or the package for it is not installed.
        SourceMissingError, SourceError: the file does not exist, or cannot be read.
    """

    request_bytes = 2 << 20  # fsspec returns bytes objects, of which `MAX_IN_FLIGHT` are in memory

    def __init__(self, address: Address):
        super().__init__(address)
        self._file_system, self._path = _find_file_system(address)
        # Only asynchronous packages are made for concurrent reads: all reads from tar:// share one position.
        self._threads = ThreadPoolExecutor(MAX_IN_FLIGHT if self._file_system.async_impl else 1, "fsspec")
        self.size, self._key, self.etag = self._state()
        self._opened_ns = time.time_ns()

    @property
    def version(self) -> dict[str, str | int | None]:
        return {"key": self._key} if self._key else {UNVERSIONED: self._opened_ns}

    def require_unchanged(self) -> None:
        if self._state()[:2] != (self.size, self._key):
            raise ChangedError(
                f"{self.where} was changed while it was read. Delete the unfinished output, and run again."
            )

    def close(self) -> None:
        super().close()
        # Do not wait: a store that does not respond may block a thread for long.
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _state(self) -> tuple[int, str, str]:
        """Return the file's size, version and ETag as they are now; those that the store does not report are empty."""
        return _result_of(self._query_state, self._threads, self.address)

    def _query_state(self) -> tuple[int, str, str]:
        self._file_system.invalidate_cache()
        info = self._file_system.info(self._path)
        if info["type"] != "file":
            raise SourceError(f"{self.where} is not a file. Give the URL of a .pth or .safetensors file.")
        return int(info["size"]), _version(info), str(info.get("ETag") or "")

    def _request(self, wanted: ByteRange) -> "_FsspecResponse":
        data = self._threads.submit(self._file_system.cat_file, self._path, start=wanted.start, end=wanted.end)
        return _FsspecResponse(data, wanted.length, self.address)


class _FsspecResponse:
    def __init__(self, data: "Future[bytes]", length: int, address: Address):
        self._data, self._at, self._length, self._address = data, 0, length, address

    def readinto(self, buffer: memoryview) -> int:
        try:
            data = result_in_time(self._data, self._length, self._address)
        except StreamconvError:
            raise
        except Exception as error:  # each store's package has its own exceptions
            raise ConnectionError(redacted(f"{type(error).__name__}: {error}", self._address.secrets)) from None
        count = min(len(buffer), len(data) - self._at)
        buffer[:count] = data[self._at : self._at + count]
        self._at += count
        return count

    def close(self) -> None:
        self._data.cancel()


def list_folder(folder: Address) -> dict[str, tuple[int, str]]:
    """Return the files directly in a store's folder by name, each with its size and version; none without a folder.

    Raises:
        UsageError, SourceError: as for `FsspecFile`.
    """
    file_system, path = _find_file_system(folder)

    def query() -> dict[str, tuple[int, str]]:
        file_system.invalidate_cache()
        try:
            found = file_system.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        files = (info for info in found if info["type"] == "file")
        return {str(info["name"]).rpartition("/")[2]: (int(info["size"]), _version(info)) for info in files}

    threads = ThreadPoolExecutor(1, "fsspec")
    try:
        return _result_of(query, threads, folder)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _result_of(query: "Callable[[], Result]", threads: ThreadPoolExecutor, address: Address) -> "Result":
    """Return the result of a query about a file or folder; failures are retried a few times."""
    for pause in (*retries.RETRY_WAITS_SECONDS[: retries.RETRIES_BEFORE_OPEN], None):
        try:
            return result_in_time(threads.submit(query), 0, address)
        except FileNotFoundError:
            raise SourceMissingError(f"{address}: there is no such file.") from None
        except StreamconvError:
            raise
        except Exception as error:  # each store's package has its own exceptions
            failure, reason = error, printable(redacted(f"{type(error).__name__}: {error}", address.secrets))
        if pause is None or isinstance(failure, PermissionError):
            break
        _log.warning("%s: %s; trying again in %g s", address, reason, pause)
        time.sleep(pause)
    kind = RefusedError if isinstance(failure, PermissionError) else StoreReadError
    raise kind(f"{address} cannot be read: {reason}. Check the URL and your credentials.")


def _version(info: dict[str, Any]) -> str:
    """Return a hash of those entries of fsspec's ``info`` that change with the contents; "" if there are none.

    A hash, because entries may be secret.
    """
    plain = (str, bytes, int, float, date, tuple)  # other values may show an address in memory
    found = {name: value for name, value in info.items() if _IDENTIFYING.search(name) and isinstance(value, plain)}
    return sha256(repr(sorted(found.items(), key=str)).encode()).hexdigest() if found else ""


def result_in_time(future: "Future[Result]", length: int, address: Address) -> Result:
    """Return a future's result, which holds ``length`` bytes of the file at ``address``.

    A chain of file systems may fetch a whole file first, so it has no limit.

    Raises:
        NetworkError: it takes longer than at `MIN_STORE_RATE`.
    """
    seconds = slow.RESPONSE_SECONDS + length / slow.MIN_STORE_RATE
    if not wait([future], seconds if "::" not in address.url else None).done:
        what = f"{length:,} bytes" if length else "the file's size"
        raise NetworkError(
            f"{address} cannot be read: its store did not send {what} within {seconds:,.0f} s"
            f"{f' ({length / seconds:,.0f} bytes/s)' if length else ''}. Check the network, and run the same "
            "command again."
        )
    return future.result()


def _find_file_system(address: Address) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{address} needs the Python package fsspec, which is not installed. "
            "Run `pip install` with the package for the store, such as s3fs or gcsfs, which also installs fsspec."
        ) from error
    try:
        file_system, path = url_to_fs(address.url)
        return file_system, str(path)
    except Exception as error:  # each store's package has its own exceptions
        reason = printable(redacted(str(error), address.secrets))
        if isinstance(error, ImportError):  # the package for the scheme is missing; fsspec's message names it
            raise UsageError(f"{address}: {reason}.") from None
        if isinstance(error, ValueError):
            raise UsageError(f"{address}: {reason}. Give a local file, or an http, https, hf, s3 or gs URL.") from None
        raise SourceError(f"{address} cannot be read: {type(error).__name__}: {reason}.") from None
