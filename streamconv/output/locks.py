"""Exclusive access to a file: by the system's lock or, on file systems without locks, by a lock file beside it.

The system releases the lock of a process that dies. A lock file stays, and so records its process. If that ran on this
system and is dead, the file is ignored; if it ran anywhere else, only a person can tell.
"""

import errno
import fcntl
import json
import os
import stat
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from streamconv.errors import SourceError
from streamconv.files.local import read_small
from streamconv.formats.limits import parse_small_json
from streamconv.formats.typed_json import parse
from streamconv.output.fallbacks import NOT_SUPPORTED, Lack, report
from streamconv.output.processes import Process

_HELD = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES})  # EACCES: CIFS
_NO_LOCKS = NOT_SUPPORTED | {errno.ENOLCK}  # ENOLCK: NFS without its lock service


class LockedError(Exception):
    """Another process holds the lock. ``holder`` is None if it is not known."""

    def __init__(self, holder: Process | None = None, lock_file: Path | None = None):
        self.holder, self._lock_file = holder, lock_file
        super().__init__(holder, lock_file)

    def message(self, what: Path, process: Process | None = None) -> str:
        """Return a message that ``what`` is being written by the holder or, if that is not known, by ``process``."""
        writing = f"{what} is being written by {self.holder or process or 'another process'}"
        if self._lock_file is None or (self.holder is not None and self.holder.is_here):
            return f"{writing}. Let it finish, or end it."
        return (
            f"{writing}, unless that process was killed. Let it finish. If it no longer runs, delete "
            f"{self._lock_file} and run the same command again."
        )


class LockedFile:
    """A file that this process has opened and locked, until it is closed. ``fd`` is its descriptor."""

    def __init__(self, fd: int, path: Path, mark: bytes | None):
        self.fd, self._path, self._mark = fd, path, mark

    def is_still_ours(self) -> bool:
        """Return whether the path still names the open file, and nobody has removed the lock file.

        Raises:
            OSError: the file system does not answer.
        """
        if self._mark is not None and _read_mark(_lock_path(self._path)) != self._mark:
            return False
        return _is_linked(self.fd, self._path)

    def close(self) -> None:
        """Release the lock and close the file."""
        os.close(self.fd)
        lock = _lock_path(self._path)
        if self._mark is not None and _read_mark(lock) == self._mark:
            with suppress(OSError):  # if it stays, it names a process that has ended
                lock.unlink()


def open_exclusive(path: Path, *, is_covered: bool = False) -> LockedFile:
    """Open a file, created if it does not exist, and lock it until it is closed; links are not followed.

    Args:
        is_covered: Another lock that this process holds, such as that of a journal, keeps other processes away. So no
            lock file is needed.

    Raises:
        LockedError: another process has locked it.
        OSError: it cannot be opened or locked, or it has a second name, under which it would be changed too.
    """
    lock, mark = _lock_path(path), None
    has_dead_holder = _has_dead_holder(lock)
    is_new = not os.path.lexists(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            raise OSError(errno.EMLINK, "it has several names, or is not a file; remove it")
        refusal = _flock(fd)
        if refusal is None:
            if has_dead_holder:
                _remove_dead(lock)
        else:
            report(path, Lack.LOCKS, refusal)
            mark = None if is_covered else _take(lock)
        file = LockedFile(fd, path, mark)
        if not file.is_still_ours():
            raise LockedError  # its writer finished between our open and our lock
    except BaseException as error:
        LockedFile(fd, path, mark).close()
        if is_new and isinstance(error, OSError):  # no process can lock it
            with suppress(OSError):
                path.unlink()
        raise
    return file


def require_unlocked(path: Path) -> None:
    """Check as `open_exclusive` does that no other process has locked a file, and change nothing.

    Raises:
        LockedError, OSError: as for `open_exclusive`.
    """
    _has_dead_holder(_lock_path(path))
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _flock(fd)
        finally:
            os.close(fd)


def _flock(fd: int) -> OSError | None:
    """Lock an open file; return the error if its file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise LockedError from None
        if error.errno not in _NO_LOCKS:
            raise
        return error
    return None


def _is_linked(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _take(lock: Path) -> bytes:
    """Create a lock file; return its contents.

    Raises:
        LockedError: a process that may be alive holds it.
    """
    mark = json.dumps({**asdict(Process.this()), "key": os.urandom(8).hex()}).encode()
    while True:
        try:
            fd = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            _remove_dead(lock)
            continue
        try:
            os.write(fd, mark)
        except BaseException:
            lock.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return mark


def _remove_dead(lock: Path) -> None:
    """Remove the lock file of a dead process.

    Only processes of this system know that it is dead, so a name in the system's memory keeps all but one away. It is
    gone with its process. Without it, one process could remove the lock file that another one has just created.
    """
    import socket  # rarely needed

    place = os.path.join(os.path.realpath(lock.parent), lock.name)
    with socket.socket(socket.AF_UNIX) as name:
        try:
            name.bind(f"\0streamconv {sha256(os.fsencode(place)).hexdigest()}")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise LockedError from None  # other errors: the system has no such names
        if _has_dead_holder(lock):
            lock.unlink(missing_ok=True)


def _has_dead_holder(lock: Path) -> bool:
    """Return whether there is a lock file of a dead process; refuse any other lock file."""
    if (found := _read_mark(lock)) is None:
        return False
    holder = _process_of(found)
    if holder is None or not holder.is_dead:
        raise LockedError(holder, lock)
    return True


def _read_mark(lock: Path) -> bytes | None:
    """Return the contents of a lock file; None if there is none."""
    if not os.path.lexists(lock):
        return None
    try:
        return read_small(lock)
    except SourceError:  # removed meanwhile, or unreadable
        return b"" if os.path.lexists(lock) else None


def _process_of(mark: bytes | None) -> Process | None:
    try:
        process: Process = parse(Process, parse_small_json(mark or b""))
    except ValueError:  # its process was killed while it wrote it
        return None
    return process
