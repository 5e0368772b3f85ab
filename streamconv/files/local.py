"""Where bytes come from: a file of this machine, or one at an address."""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from streamconv.errors import (
    ChangedError,
    NotACheckpointError,
    SourceError,
    SourceMissingError,
    TruncatedError,
)
from streamconv.files.base import ByteRange, FileRef

MAX_JSON_BYTES = 10 << 20  # 65,536 tensors take 7 MB to 9 MB of a safetensors header
_LET_GO_BYTES = 32 << 20  # read of a file that memory cannot hold, between two times that the cache is told so


def read_small(path: Path) -> bytes:
    """A file that is read whole: an index, a configuration, a manifest.

    Raises:
        SourceMissingError: there is none.
        SourceError: it is no regular file, larger than `MAX_JSON_BYTES`, or cannot be read.
    """
    file = LocalFile(path)
    try:
        if file.size > MAX_JSON_BYTES:
            raise SourceError(
                f"{path} has {file.size:,} bytes, and streamconv reads up to {MAX_JSON_BYTES:,} of its kind."
            )
        return file.read(0, file.size)
    finally:
        file.close()


class LocalFile:
    """A file opened for reading at offsets; safe to use from several threads."""

    def __init__(self, path: Path):
        self.path = path
        try:
            # preadv, not mmap: touched pages of a mapping count in RSS, a reused buffer does not grow.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise NotACheckpointError(f"{path} is no regular file.")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except FileNotFoundError:
            raise SourceMissingError(f"{path}: there is no such file.") from None
        except (OSError, ValueError) as error:
            raise SourceError(f"{path} cannot be opened: {error}.") from error
        state = os.fstat(self._file.fileno())
        self.size, self.modified_ns, self.changed_ns = state.st_size, state.st_mtime_ns, state.st_ctime_ns
        self._is_let_go = hasattr(os, "posix_fadvise") and self.size > _memory_bytes() // 2
        self._read_bytes = 0  # since the cache let go

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def where(self) -> str:
        return str(self.path)

    @cached_property
    def ref(self) -> FileRef:
        """With the times, in nanoseconds since 1970, at which its contents and anything of it last changed."""
        version = (("changed_ns", self.changed_ns), ("modified_ns", self.modified_ns))
        return FileRef(Path(os.path.abspath(self.path)), self.size, version)

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Nothing to prepare: the system reads ahead by itself."""

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on.

        Raises:
            TruncatedError: the file ends within the range.
            SourceError: the disk reports an error.
        """
        at = 0
        while at < len(buffer):
            try:
                count = os.preadv(self._file.fileno(), [buffer[at:]], offset + at)
            except OSError as error:
                raise SourceError(
                    f"{self.path} cannot be read at byte {offset + at:,}: {error.strerror}. "
                    "Fetch it again, or copy it to another disk, and run the same command again."
                ) from error
            if not count:
                raise TruncatedError(
                    f"{self.path} ends at byte {offset + at:,}, within its contents: "
                    "it was cut short or is being changed. Fetch it again."
                )
            at += count
        self._read_bytes += at
        if self._is_let_go and self._read_bytes >= _LET_GO_BYTES:
            # It would be gone before it is read again. To find room for it page by page takes a quarter of the time.
            with suppress(OSError):
                os.posix_fadvise(self._file.fileno(), 0, offset, os.POSIX_FADV_DONTNEED)
            self._read_bytes = 0

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on; errors as `read_at`'s."""
        data = bytearray(length)
        self.read_at(offset, memoryview(data))
        return bytes(data)

    def require_unchanged(self) -> None:
        """Compare size and times with what they were when the file was opened.

        Raises:
            ChangedError: they are others.
        """
        state = os.fstat(self._file.fileno())
        if (state.st_size, state.st_mtime_ns, state.st_ctime_ns) != (self.size, self.modified_ns, self.changed_ns):
            raise ChangedError(f"{self.path} was changed while it was read. Run again when it is whole.")

    def close(self) -> None:
        self._file.close()


def _memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
