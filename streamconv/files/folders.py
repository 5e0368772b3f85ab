"""A folder of files, on this machine or in a store: where its files are, and its small files."""

from contextlib import closing
from pathlib import Path

from streamconv.errors import SourceError, SourceMissingError
from streamconv.files import local
from streamconv.files.address import Location
from streamconv.files.base import ByteRange
from streamconv.files.local import MAX_JSON_BYTES
from streamconv.files.open import open_file


def file_in(folder: Location, name: str) -> Location:
    """Return the location of a file in a folder."""
    return folder / name if isinstance(folder, Path) else folder.inside(name)


def beside(file: Location, name: str) -> Location:
    """Return the location of another file in a file's folder."""
    if isinstance(file, Path):
        return file.with_name(name)
    address = file.beside(name)
    assert address is not None, "a data: URL has no folder"
    return address


def exists(location: Location) -> bool:
    """Return whether there is a file.

    Raises:
        SourceError: that cannot be determined.
    """
    if isinstance(location, Path):
        return local.exists(location)
    try:
        open_file(location).close()
    except SourceMissingError:
        return False
    return True


def read_small(location: Location, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole file, such as an index, a configuration or a manifest.

    Raises:
        SourceMissingError: it does not exist.
        SourceError: it cannot be read, or is larger than ``max_bytes``.
    """
    if isinstance(location, Path):
        return local.read_small(location, max_bytes)
    with closing(open_file(location)) as file:
        if file.size > max_bytes:
            raise SourceError(
                f"{location} has {file.size:,} bytes; streamconv reads at most {max_bytes:,} bytes of such a file."
            )
        file.prefetch([ByteRange(0, file.size)])
        return file.read(0, file.size)
