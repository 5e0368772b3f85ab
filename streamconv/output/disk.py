"""Checks before the work that a disk has room for a file or folder, and that it can be written. Nothing is written."""

import errno
import os
from pathlib import Path

from streamconv.errors import OutputError
from streamconv.output.fallbacks import NOT_SUPPORTED
from streamconv.output.files import as_output_error


def require_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be created, or that cannot be created itself. Nothing is written.

    Raises:
        OutputError
    """
    with as_output_error(folder):
        existing = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
        if not os.path.isdir(existing):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _is_there(path: Path) -> bool:
    """Return whether a path exists; unlike `os.path.exists`, raise `OSError` if that is not known."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def require_space(folder: Path, size: int, *, besides: tuple[Path, int] | None = None) -> None:
    """Refuse output that would not fit.

    Args:
        folder: It need not exist yet.
        size: The bytes that it will get.
        besides: Another folder and the bytes that it will get, too. They count if it is on the same disk.

    Raises:
        OutputError: the disk has too few bytes free.
    """
    existing = _nearest(folder)
    what = f"{folder} needs {size:,} bytes and its disk has"
    if besides is not None and os.stat(_nearest(besides[0])).st_dev == os.stat(existing).st_dev:
        size += besides[1]
        what = f"{folder} and {besides[0]} together need {size:,} bytes and their disk has"
    free = _free_bytes(existing)
    if free is not None and free < size:
        raise OutputError(f"{what} {free:,} free. Make room, or choose a folder on another disk.")


def _free_bytes(folder: Path) -> int | None:
    """Return the disk's free bytes; None if its file system does not report them, as some in user space."""
    try:
        state = os.statvfs(folder)  # as shutil.disk_usage does; importing shutil takes a quarter of a megabyte
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return None
    return state.f_bavail * state.f_frsize if state.f_bavail or state.f_blocks else None


def allocated_bytes(path: Path, written: int | None = None) -> int:
    """Return how much space a file takes, 0 if it does not exist.

    Args:
        written: The bytes of it that were written, if it is not complete. Compressing file systems need fewer blocks
            than that, and some in user space report none.
    """
    if not os.path.exists(path):
        return 0
    state = path.stat()
    return max(state.st_blocks * 512, state.st_size if written is None else min(written, state.st_size))


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest of its parents that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
