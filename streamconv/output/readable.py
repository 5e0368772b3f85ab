"""Reports files of an output that cannot be read as errors, and lists those that count as its weights.

A missing or altered file is a difference, which verification reports. One that cannot be read proves nothing.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from streamconv.errors import (
    NetworkError,
    OutputError,
    RefusedError,
    StoreReadError,
    UnreadableError,
)
from streamconv.files.address import Address, Location
from streamconv.formats.safetensors import CONFLICTING_PATTERNS

_FIX = "Make it readable, and run the same command again."


@contextmanager
def reading_output() -> Iterator[None]:
    """Turn an error of the block that says nothing about the output's contents into an `OutputError`."""
    try:
        yield
    except (NetworkError, RefusedError, StoreReadError) as error:
        raise OutputError(str(error)) from error
    except UnreadableError as error:
        raise OutputError(
            f"{error.reason}, so its contents are not known. Make it a file that can be read, and run the same command "
            "again."
        ) from error


def require_folder(path: Path) -> None:
    """Check that a path is a folder.

    Raises:
        OutputError: it is not, or cannot be accessed.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a path with a null byte is a ValueError
        is_folder = False
    except OSError as error:
        raise OutputError(f"{path} cannot be accessed: {error.strerror}. {_FIX}") from error
    if not is_folder:
        raise OutputError(f"{path} is not a folder. Give a folder that streamconv wrote.")


def names_in(folder: Path) -> list[str]:
    """Return the names of the files in a folder; none if there is no such folder.

    Raises:
        OutputError: they cannot be read.
    """
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(
            f"The names of the files in {folder} cannot be read: {error.strerror}, so it may hold other weights. {_FIX}"
        ) from error


def weights_in(folder: Location) -> set[str]:
    """Return the names of the files that transformers could load as a model's; none if there is no such folder.

    Raises:
        OutputError: the folder cannot be listed.
    """
    names = names_in(folder) if isinstance(folder, Path) else states_in_store(folder)
    return {name for name in names if any(fnmatch(name, pattern) for pattern in CONFLICTING_PATTERNS)}


def states_in_store(folder: Address) -> dict[str, tuple[int, str]]:
    """Return the files in a store's folder by name, each with its size and version.

    Raises:
        OutputError: the folder cannot be listed.
    """
    from streamconv.files.fsspec import list_folder  # only now, as a local folder does not need it

    with reading_output():
        return list_folder(folder)
