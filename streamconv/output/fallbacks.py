"""Reports what a file system cannot do, and what is done instead.

Network file systems and those in user space often lack locks, syncing of folders or reserved space. Each lack is logged
once for each file system, and is part of the results of conversions.
"""

import errno
import os
from enum import Enum
from pathlib import Path

from streamconv.logs import logger

_log = logger(__name__)

NOT_SUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""The errors with which POSIX, Linux and FUSE refuse a call that a file system lacks. EIO and others are failures."""


class Lack(Enum):
    """A call that a file system refuses, and the consequence."""

    LOCKS = "has no file locks ({}): lock files keep other processes away instead"
    FOLDER_SYNC = (
        "cannot sync folders ({}): after a power cut, files that were just written may be missing, and the same "
        "command writes them again"
    )
    FILE_SYNC = (
        "cannot sync files ({}): after a power cut, check them with `streamconv verify`, since complete files may "
        "have lost their contents"
    )
    RESERVING = "cannot reserve space ({}): a disk that is too small is noticed only once it is full"


_found: dict[int, dict[Lack, str]] = {}  # by device


def report(path: Path, lack: Lack, error: OSError) -> None:
    """Record that the file system of ``path``, an existing file or folder, lacks something; log it the first time."""
    found = _found.setdefault(os.stat(path).st_dev, {})
    if lack not in found:
        found[lack] = lack.value.format(error.strerror)
        folder = path if path.is_dir() else path.parent
        _log.warning("The file system of %s %s.", folder, found[lack])


def lacks_of(folder: Path) -> tuple[str, ...]:
    """Return what is known to be lacking in a folder's file system, each as the end of a sentence about it.

    A staging folder, which is gone at the end, was on the file system of its nearest parent.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return tuple(_found.get(os.stat(nearest).st_dev, {}).values())
