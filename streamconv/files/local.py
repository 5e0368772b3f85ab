"""Files on this machine.

Weights are read at offsets into buffers of the caller; small files, such as an index, are read whole.
"""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from streamconv.errors import (
    ChangedError,
    SourceError,
    SourceMissingError,
    TruncatedError,
    UnreadableError,
    located,
)
from streamconv.files.address import Address
from streamconv.files.base import ByteRange, FileRef

MAX_JSON_BYTES = 10 << 20  # 65,536 tensors take 7 MB to 9 MB of a safetensors header
_EVICT_INTERVAL_BYTES = 32 << 20  # read from a file that memory cannot hold, before its cached pages are dropped


def read_small(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole file, such as an index, a configuration or a manifest.

    Raises:
        SourceMissingError: it does not exist.
        UnreadableError: it is not a regular file, or cannot be read.
        SourceError: it is larger than ``max_bytes``.
    """
    file = LocalFile(path)
    try:
        if file.size > max_bytes:
            raise SourceError(
                f"{path} has {file.size:,} bytes; streamconv reads at most {max_bytes:,} bytes of such a file."
            )
        return file.read(0, file.size)
    finally:
        file.close()


def exists(path: Path) -> bool:
    """Return whether a path exists and, if it is a link, its target, too.

    Raises:
        UnreadableError: that cannot be determined: a folder in the path cannot be accessed, or links form a loop.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a path with a null byte is a ValueError
        return False
    except OSError as error:
        raise UnreadableError(f"{path} cannot be opened: {error.strerror}") from error
    return True


class LocalFile:
    """A file opened for reading at offsets; safe to use from several threads.

    Raises:
        SourceMissingError: it does not exist.
        UnreadableError: it is not a regular file, or cannot be opened.
    """

    def __init__(self, path: Path, origin: Address | None = None):
        self.path, self.origin, self.where = path, origin, str(origin or path)
        try:
            # preadv, not mmap: touched pages of a mapping count in RSS, a reused buffer does not grow.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UnreadableError(f"{self.where} is not a regular file")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except FileNotFoundError:
            raise SourceMissingError(f"{self.where}: there is no such file.") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UnreadableError(f"{self.where} cannot be opened: {reason}") from error
        state = os.fstat(self._file.fileno())
        self.size, self.modified_ns, self.changed_ns = state.st_size, state.st_mtime_ns, state.st_ctime_ns
        self._evicts_read_pages = hasattr(os, "posix_fadvise") and self.size > _memory_bytes() // 2
        self._read_bytes = 0  # since pages were last dropped

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def ref(self) -> FileRef:
        """The file, with the times of its last modification and status change, in nanoseconds since 1970."""
        version = (("changed_ns", self.changed_ns), ("modified_ns", self.modified_ns))
        return FileRef(Path(os.path.abspath(self.path)), self.size, version)

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Do nothing: the system reads ahead by itself."""

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on.

        Raises:
            TruncatedError: the file ends within the range.
            UnreadableError: the disk reports an error.
        """
        at = 0
        with located(self.path):
            while at < len(buffer):
                try:
                    count = os.preadv(self._file.fileno(), [buffer[at:]], offset + at)
                except OSError as error:
                    raise UnreadableError(
                        f"{self.where} cannot be read at byte {offset + at:,}: {error.strerror}",
                        "Fetch it again, or copy it to another disk, and run the same command again.",
                    ) from error
                if not count:
                    raise TruncatedError(
                        f"{self.where} ends at byte {offset + at:,}, within its contents: "
                        "it was cut short or is being changed. Fetch it again."
                    )
                at += count
        self._read_bytes += at
        if self._evicts_read_pages and self._read_bytes >= _EVICT_INTERVAL_BYTES:
            # The cache would evict these pages before they are read again. Having the kernel find them one by one
            # takes a quarter of the reading time.
            with suppress(OSError):
                os.posix_fadvise(self._file.fileno(), 0, offset, os.POSIX_FADV_DONTNEED)
            self._read_bytes = 0

    def read_runs(self, starts: Iterable[int], length: int, buffer: memoryview) -> None:
        """Read ``length`` bytes from each start on, one after another into ``buffer``; raises what `read_at` raises."""
        descriptor, preadv, at = self._file.fileno(), os.preadv, 0
        for start in starts:
            part = buffer[at : at + length]
            try:
                count = preadv(descriptor, [part], start)
            except OSError:
                count = 0
            if count != length:
                self.read_at(start, part)
            at += length

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes from ``offset`` on; raises what `read_at` raises."""
        data = bytearray(length)
        self.read_at(offset, memoryview(data))
        return bytes(data)

    def require_unchanged(self) -> None:
        """Compare size and times with those from when the file was opened.

        Raises:
            ChangedError: they differ.
        """
        state = os.fstat(self._file.fileno())
        if (state.st_size, state.st_mtime_ns, state.st_ctime_ns) != (self.size, self.modified_ns, self.changed_ns):
            raise ChangedError(f"{self.where} was changed while it was read. Run again when it is complete.")

    def close(self) -> None:
        self._file.close()


def _memory_bytes() -> int:
    """Return the size of the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
