"""Opens a file by its location, with the class that its scheme needs."""

from pathlib import Path

from streamconv.files.address import Location, hf_to_https
from streamconv.files.base import File
from streamconv.files.local import LocalFile


def open_file(location: Location, where: str | None = None) -> File:
    """Open a file. ``where`` is what messages call a file on this machine, instead of its path.

    Raises:
        UsageError, SourceError: see `LocalFile`, `HttpFile` and `FsspecFile`.
    """
    if isinstance(location, Path):
        return LocalFile(location, where)
    # Imported only when needed, so that a local conversion does not pay for their memory.
    if location.scheme == "data":
        from streamconv.files.inline import InlineFile

        return InlineFile(location)
    if location.scheme in ("http", "https", "hf"):
        from streamconv.files.http import HttpFile

        return HttpFile(hf_to_https(location) if location.scheme == "hf" else location)
    from streamconv.files.fsspec import FsspecFile

    return FsspecFile(location)
