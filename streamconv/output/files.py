"""Files that are whole or absent: written under a temporary name, synced, renamed, their folder synced."""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from streamconv.errors import OutputError

PAGE_BYTES = 4096  # what disks and file systems want to be given whole


class OutputFile:
    """A file of known size that is being written, at offsets."""

    def __init__(self, fd: int, path: Path):
        self._fd, self._path = fd, path
        self._is_direct: bool | None = None  # None: not tried yet

    @property
    def size(self) -> int:
        """How many bytes it has now."""
        return os.fstat(self._fd).st_size

    def truncate(self, size: int) -> None:
        with as_output_error(self._path):
            os.ftruncate(self._fd, size)

    def allocate(self, size: int) -> None:
        """Reserve the disk's blocks, so that a full disk is noticed now and writing is fast; what is there stays."""
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
        """Write past the system's cache, where the file system can. From then on nothing else reads or writes.

        ``offset``, the length and the memory of ``pages`` are multiples of `PAGE_BYTES`. To find memory for
        the cache's copy and to bring it to the disk takes longer than all else.
        """
        if self._is_direct is None:
            try:
                self._set_direct(True)
            except (OSError, AttributeError):  # a file system that cannot; macOS has no such flag
                self._is_direct = False
        self.write_at(offset, pages)

    def close(self) -> None:
        """What another thread still wants of it fails; it shall not meet the next file that gets the descriptor."""
        fd, self._fd = self._fd, -1
        os.close(fd)

    def _pwrite(self, data: memoryview, offset: int) -> int:
        try:
            return os.pwrite(self._fd, data, offset)
        except OSError as error:
            if not self._is_direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        self._set_direct(False)  # a file system that says only now that it cannot, or wants larger pages
        return os.pwrite(self._fd, data, offset)

    def _set_direct(self, is_direct: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if is_direct else flags & ~os.O_DIRECT)
        self._is_direct = is_direct

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with what was written from ``offset`` on, all of it within the size."""
        with as_output_error(self._path):
            while buffer:
                count = os.preadv(self._fd, [buffer], offset)
                if not count:
                    raise OSError(errno.EIO, "it ends before its size")
                buffer, offset = buffer[count:], offset + count

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """The file as a Python file object, for those who write one after another."""
        with as_output_error(self._path), os.fdopen(os.dup(self._fd), "r+b") as stream:
            yield stream

    def sync(self, offset: int, length: int) -> None:
        """Bring everything written so far to the disk, and let go of this range's cached pages.

        Syncing on the way keeps the disk busy; letting go keeps a small machine's cache for others
        and, where all goes through the cache, writes the next range into the same, warm pages.
        """
        with as_output_error(self._path):
            getattr(os, "fdatasync", os.fsync)(self._fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)


class PageAligner:
    """The bytes of a file in order, buffer by buffer, as whole pages for `OutputFile.write_pages`.

    The page that a buffer ends within is written as it is, and once more with the next buffer, which begins with
    a copy of it. What the last one has beyond the file's end is cut off in the end.
    """

    def __init__(self) -> None:
        self.position = 0
        self._begun = b""
        self._buffer = memoryview(b"")

    def next_window(self, buffer: memoryview) -> memoryview:
        """Where in ``buffer``, which is of pages of memory, the next bytes belong."""
        buffer[: len(self._begun)] = self._begun
        self._buffer = buffer
        return buffer[len(self._begun) :]

    def add(self, count: int) -> tuple[int, memoryview]:
        """Take note of ``count`` bytes that are there now; give the offset and the pages that hold them."""
        offset, end = self.position - len(self._begun), len(self._begun) + count
        self.position += count
        self._begun = bytes(self._buffer[end - end % PAGE_BYTES : end])
        return offset, self._buffer[: end + -end % PAGE_BYTES]


def temporary_path(path: Path, version: str = "") -> Path:
    """Where ``path`` is written before it is whole: a hidden name that no one else gives."""
    return path.with_name(f".{path.name}{version and '.'}{version}.streamconv-incomplete")


def open_exclusive(path: Path) -> int:
    """The file, made where there is none, opened and locked until it is closed; no link is followed.

    The system lets go of a dead process's lock by itself.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be opened or locked, or has another name, too, under which it would be changed.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            raise OSError(errno.EMLINK, "it is a link to another file, or no file; remove it")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_still_linked(fd, path):
            raise BlockingIOError  # its writer finished between our opening and our locking
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_still_linked(fd: int, path: Path) -> bool:
    """Whether ``path`` still is the name of the file that is open: no one removed it, or put another in its place."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextmanager
def atomic_file(path: Path, *, resume: bool = False, version: str = "") -> Iterator[OutputFile]:
    """A new file that gets its name when the block ends well.

    When it does not, the file vanishes; with ``resume`` it stays under its temporary name, and the next one
    of the same ``version`` begins with what it holds. Its mode is the umask's choice, as for any file that a
    user makes.

    Raises:
        OutputError: the disk is full, or does not let us write.
    """
    temporary = temporary_path(path, version)
    with as_output_error(temporary):
        try:
            fd = open_exclusive(temporary)
        except BlockingIOError:
            raise OutputError(f"{path} is being written by another process. Let it finish, or end it.") from None
    file = OutputFile(fd, path)
    try:
        with as_output_error(path):
            if resume:
                sync_folder(path.parent)  # its temporary name lasts, as what will be synced under it
            else:
                os.ftruncate(fd, 0)
        yield file
        with as_output_error(path):
            os.fsync(fd)
            if not is_still_linked(fd, temporary):
                raise FileNotFoundError(errno.ENOENT, "someone removed it meanwhile")
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        if not resume:
            with suppress(OSError):  # a disk that lets nothing be removed; the first error says it
                if is_still_linked(fd, temporary):
                    temporary.unlink()
        raise
    finally:
        file.close()


def write_file(path: Path, data: bytes) -> None:
    """A small file, whole or absent; errors as `atomic_file`'s."""
    with atomic_file(path) as file:
        file.write_at(0, memoryview(data))


def make_folder(folder: Path) -> None:
    """The folder and those above it, made where they are not, so that they last."""
    if not os.path.isdir(folder):
        make_folder(folder.absolute().parent)
        folder.mkdir(exist_ok=True)
        try:
            sync_folder(folder.absolute().parent)
        except OSError:
            folder.rmdir()
            raise


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last; where a folder cannot be opened (Windows), they last anyway."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


_MENDS = {
    errno.ENOSPC: "Make room and run the same command again.",
    errno.EDQUOT: "Make room and run the same command again.",
    errno.ENOENT: "Its folder is gone. Run the same command again.",
    errno.EFBIG: "Choose a disk that takes files as large, or give convert a smaller --max-shard-size.",
}


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """An `OSError` of the block becomes an `OutputError` that says what cannot be done with ``path``."""
    try:
        yield
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, "Choose another place for the output.")
        raise OutputError(f"{path} cannot be written: {error.strerror}. {mend}") from error


def require_space(folder: Path, size: int) -> None:
    """Refuse now what would not fit.

    Raises:
        OutputError: the disk of ``folder``, which need not exist yet, has fewer than ``size`` bytes free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    free = shutil.disk_usage(there).free
    if free < size:
        raise OutputError(
            f"{folder} needs {size:,} bytes and its disk has {free:,} free. "
            "Make room, or choose a folder on another disk."
        )
