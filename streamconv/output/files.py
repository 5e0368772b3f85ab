"""Files that are complete or absent: written under a temporary name, synced, renamed; then their folder is synced."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from streamconv.errors import OutputError
from streamconv.output.fallbacks import NOT_SUPPORTED, Lack, report
from streamconv.output.locks import LockedError, open_exclusive

PAGE_BYTES = 4096  # the unit in which disks and file systems write


class OutputFile:
    """A file that is being written at offsets."""

    def __init__(self, fd: int, path: Path):
        self._fd, self._path = fd, path
        self._is_direct: bool | None = None  # None: not tried yet

    def truncate(self, size: int) -> None:
        with as_output_error(self._path):
            os.ftruncate(self._fd, size)

    def allocate(self, size: int) -> None:
        """Reserve the disk's blocks, so that a full disk is noticed now and writing is fast; the contents stay."""
        with as_output_error(self._path):
            if hasattr(os, "posix_fallocate") and size:
                try:
                    os.posix_fallocate(self._fd, 0, size)
                except OSError as error:
                    if error.errno not in NOT_SUPPORTED:
                        raise
                    report(self._path.parent, Lack.RESERVING, error)
            os.ftruncate(self._fd, size)

    def write_at(self, offset: int, data: memoryview) -> None:
        with as_output_error(self._path):
            while data:
                count = self._pwrite(data, offset)
                if not count:
                    raise OSError(errno.EIO, "the disk takes no more bytes")
                data, offset = data[count:], offset + count

    def write_pages(self, offset: int, pages: memoryview) -> None:
        """Write past the page cache, if the file system can; afterwards, only this method may be used to write.

        ``offset``, the length and the memory address of ``pages`` are multiples of `PAGE_BYTES`. Writing through the
        page cache (allocating pages, then flushing them) is the slowest step of a conversion.
        """
        if self._is_direct is None:
            try:
                self._set_direct(True)
            except (OSError, AttributeError):  # the file system cannot; macOS has no such flag
                self._is_direct = False
        self.write_at(offset, pages)

    def detach(self) -> None:
        """Let later calls from other threads fail with EBADF, before the descriptor is closed and another file's."""
        self._fd = -1

    def _pwrite(self, data: memoryview, offset: int) -> int:
        try:
            return os.pwrite(self._fd, data, offset)
        except OSError as error:
            if not self._is_direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        self._set_direct(False)  # the file system reports only now that it cannot, or needs larger pages
        return os.pwrite(self._fd, data, offset)

    def _set_direct(self, is_direct: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if is_direct else flags & ~os.O_DIRECT)
        self._is_direct = is_direct

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the file's bytes from ``offset`` on."""
        with as_output_error(self._path):
            while buffer:
                count = os.preadv(self._fd, [buffer], offset)
                if not count:
                    raise OSError(errno.EIO, "it is shorter than it was")
                buffer, offset = buffer[count:], offset + count

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """Open the file as a Python file object, to write from its beginning."""
        with as_output_error(self._path), os.fdopen(os.dup(self._fd), "r+b") as stream:
            yield stream

    def sync(self, offset: int, length: int) -> None:
        """Flush everything written so far to the disk, and drop the cached pages of this range.

        Syncing on the way keeps the disk busy. Dropping pages leaves a small machine's cache to others and, if writes
        go through the cache, lets the next range reuse the same, warm pages.
        """
        with as_output_error(self._path):
            sync_file(self._fd, self._path.parent, only_data=True)
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # it is only advice
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)


class PageAligner:
    """Turns the bytes of a file, buffer by buffer, into whole pages for `OutputFile.write_pages`.

    The page in which a buffer ends is written incomplete, and again with the next buffer, which starts with a copy of
    it. The file is finally cut to its size.
    """

    def __init__(self) -> None:
        self.position = 0
        self._begun = b""
        self._buffer = memoryview(b"")

    def next_window(self, buffer: memoryview) -> memoryview:
        """Return the part of ``buffer``, which consists of memory pages, that the next bytes belong in."""
        buffer[: len(self._begun)] = self._begun
        self._buffer = buffer
        return buffer[len(self._begun) :]

    def add(self, count: int) -> tuple[int, memoryview]:
        """Note that ``count`` bytes are in the window; return their offset in the file, and the pages with them."""
        offset, end = self.position - len(self._begun), len(self._begun) + count
        self.position += count
        self._begun = bytes(self._buffer[end - end % PAGE_BYTES : end])
        return offset, self._buffer[: end + -end % PAGE_BYTES]


def temporary_path(path: Path) -> Path:
    """Return where ``path`` is written until it is complete: a hidden name that nobody else gives to a file."""
    return path.with_name(f".{path.name}.streamconv-incomplete")


@contextmanager
def atomic_file(path: Path, *, resume: bool = False) -> Iterator[OutputFile]:
    """Write a file that is renamed into place when the block ends well.

    Otherwise it is deleted; with ``resume`` it keeps its temporary name, and the next call starts with its contents.
    Its mode is the umask's choice, as for any file that a user creates.

    Raises:
        OutputError: the disk is full or not writable, or another process is writing the file.
    """
    temporary = temporary_path(path)
    with as_output_error(temporary):
        try:
            # A file that is resumed has a journal, which is locked.
            locked = open_exclusive(temporary, is_covered=resume)
        except LockedError as error:
            raise OutputError(error.message(path)) from None
    file = OutputFile(locked.fd, path)
    try:
        with as_output_error(path):
            if resume:
                sync_folder(path.parent)  # so that the temporary name lasts as its contents will
            else:
                os.ftruncate(locked.fd, 0)
        yield file
        with as_output_error(path):
            sync_file(locked.fd, path.parent)
            if not locked.is_still_ours():
                raise FileNotFoundError(errno.ENOENT, "it was removed while it was written")
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        if not resume:
            with suppress(OSError):  # a disk on which nothing can be removed; the first error reports it
                if locked.is_still_ours():
                    temporary.unlink()
        raise
    finally:
        file.detach()
        locked.close()


def write_file(path: Path, data: bytes) -> None:
    """Write a small file, complete or not at all; errors as for `atomic_file`."""
    with atomic_file(path) as file:
        file.write_at(0, memoryview(data))


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, so that their names last."""
    if not os.path.isdir(folder):
        make_folder(folder.absolute().parent)
        folder.mkdir(exist_ok=True)
        try:
            sync_folder(folder.absolute().parent)
        except OSError:
            folder.rmdir()
            raise


def sync_file(fd: int, place: Path, *, only_data: bool = False) -> None:
    """Make an open file's contents last, if its file system can; ``place`` is the file or its folder."""
    try:
        if only_data and hasattr(os, "fdatasync"):
            os.fdatasync(fd)
        else:
            os.fsync(fd)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        report(place, Lack.FILE_SYNC, error)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last, if its file system can."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder; renames last there anyway
        return
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError as error:  # a folder that may be written but not read
        report(folder, Lack.FOLDER_SYNC, error)
        return
    try:
        os.fsync(fd)
    except OSError as error:
        # EBADF: some network file systems sync only what is open for writing. EIO and others are failures.
        if error.errno not in NOT_SUPPORTED | {errno.EBADF}:
            raise
        report(folder, Lack.FOLDER_SYNC, error)
    finally:
        os.close(fd)


_ADVICE = {
    errno.ENOSPC: "Make room and run the same command again.",
    errno.EDQUOT: "Make room and run the same command again.",
    errno.ENOENT: "Its folder is gone. Run the same command again.",
    errno.ESTALE: "Its server has replaced or removed it. Run the same command again.",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`) and run the same command again.",
    errno.EFBIG: "Choose a disk that takes files of this size, or give convert a smaller --max-shard-size.",
}


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Raise an `OSError` of the block as an `OutputError` about ``path``."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "Choose another place for the output.")
        raise OutputError(f"{path} cannot be written: {error.strerror}. {advice}") from error
