"""Files that are complete or absent: written under a temporary name, synced, renamed; then their folder is synced."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from streamconv.errors import OutputError

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
                os.posix_fallocate(self._fd, 0, size)
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

    def close(self) -> None:
        """Close the file. Later calls from other threads fail with EBADF instead of using another file's descriptor."""
        fd, self._fd = self._fd, -1
        os.close(fd)

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
            getattr(os, "fdatasync", os.fsync)(self._fd)
            if hasattr(os, "posix_fadvise"):
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


def open_exclusive(path: Path) -> int:
    """Open a file, created if it does not exist, and lock it until it is closed; no link is followed.

    The system releases the lock of a process that dies.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: it cannot be opened or locked, or it has a second name, under which it would be changed too.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            raise OSError(errno.EMLINK, "it is a link to another file, or not a file; remove it")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_still_linked(fd, path):
            raise BlockingIOError  # its writer finished between our open and our lock
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_still_linked(fd: int, path: Path) -> bool:
    """Return whether ``path`` still names the open file: it was not removed or replaced."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


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
            fd = open_exclusive(temporary)
        except BlockingIOError:
            raise OutputError(f"{path} is being written by another process. Let it finish, or end it.") from None
    file = OutputFile(fd, path)
    try:
        with as_output_error(path):
            if resume:
                sync_folder(path.parent)  # so that the temporary name lasts as its contents will
            else:
                os.ftruncate(fd, 0)
        yield file
        with as_output_error(path):
            os.fsync(fd)
            if not is_still_linked(fd, temporary):
                raise FileNotFoundError(errno.ENOENT, "it was removed while it was written")
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        if not resume:
            with suppress(OSError):  # a disk on which nothing can be removed; the first error reports it
                if is_still_linked(fd, temporary):
                    temporary.unlink()
        raise
    finally:
        file.close()


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


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last, as far as its file system can."""
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder; renames last there anyway
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as error:
            # EINVAL is POSIX's "not possible on this file": some network file systems cannot sync a folder. Any other
            # error, such as EIO, is a failure.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)


_ADVICE = {
    errno.ENOSPC: "Make room and run the same command again.",
    errno.EDQUOT: "Make room and run the same command again.",
    errno.ENOENT: "Its folder is gone. Run the same command again.",
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
