"""Files that fsspec reaches: s3://, gs://, az:// and all that it has a package for."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from streamconv.errors import ChangedError, SourceError, SourceMissingError, StreamconvError, UsageError, printable
from streamconv.files.address import Address
from streamconv.files.base import ByteRange
from streamconv.files.remote import MAX_IN_FLIGHT, WAITS_AT_FIRST, WAITS_SECONDS, RemoteFile


class FsspecFile(RemoteFile):
    """Pinned by its size and by what fsspec calls its unique key, which holds the store's own mark of a version.

    Raises:
        UsageError: fsspec does not know the scheme, or its package is not installed.
        SourceMissingError, SourceError: there is no such file, or it may not be read.
    """

    request_bytes = 2 << 20  # fsspec gives them as bytes objects: `MAX_IN_FLIGHT` of them are in memory

    def __init__(self, address: Address, notify: Callable[[str], None]):
        super().__init__(address, notify)
        self._files, self._path = _file_system(address)
        # Of a store's package only an asynchronous one is made for several at once: tar:// shares one position.
        self._threads = ThreadPoolExecutor(MAX_IN_FLIGHT if self._files.async_impl else 1, "fsspec")
        self.size, self._key = self._state()

    @property
    def version(self) -> dict[str, str | int | None]:
        return {"key": self._key}

    def require_unchanged(self) -> None:
        if self._state() != (self.size, self._key):
            raise ChangedError(f"{self.where} was changed while it was read. Delete what was begun, and run again.")

    def close(self) -> None:
        super().close()
        self._threads.shutdown(cancel_futures=True)

    def _state(self) -> tuple[int, str]:
        for wait in (*WAITS_SECONDS[:WAITS_AT_FIRST], None):
            try:
                return self._threads.submit(self._ask_state).result()
            except FileNotFoundError:
                raise SourceMissingError(f"{self.where}: there is no such file.") from None
            except StreamconvError:
                raise
            except Exception as error:  # whatever the store's package makes of a wrong key, name or line
                failure, reason = error, printable(f"{type(error).__name__}: {error}")
            if wait is None or isinstance(failure, PermissionError):
                break
            time.sleep(wait)
        raise SourceError(f"{self.where} cannot be read: {reason}. Check the address and your credentials.")

    def _ask_state(self) -> tuple[int, str]:
        self._files.invalidate_cache()
        info = self._files.info(self._path)
        if info["type"] != "file":
            raise SourceError(f"{self.where} is no file. Give the address of a .pth or .safetensors file.")
        return int(info["size"]), str(self._files.ukey(self._path))

    def _ask(self, wanted: ByteRange) -> "_FsspecAnswer":
        return _FsspecAnswer(self._threads.submit(self._files.cat_file, self._path, wanted.start, wanted.end))


class _FsspecAnswer:
    def __init__(self, data: "Future[bytes]"):
        self._data, self._at = data, 0

    def readinto(self, buffer: memoryview) -> int:
        try:
            data = self._data.result()
        except Exception as error:  # the stores' packages have their own kinds
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        count = min(len(buffer), len(data) - self._at)
        buffer[:count] = data[self._at : self._at + count]
        self._at += count
        return count

    def close(self) -> None:
        self._data.cancel()


def _file_system(address: Address) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(address.url)
        return files, str(path)
    except ImportError as error:  # of the scheme's package, which fsspec names
        raise UsageError(f"{address}: {printable(str(error))}.") from error
    except ValueError as error:
        raise UsageError(f"{address}: {error}. Give a file, or an http, https, hf, s3 or gs address.") from error
    except Exception as error:
        raise SourceError(f"{address} cannot be read: {type(error).__name__}: {error}.") from error
