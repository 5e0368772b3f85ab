"""Opens a file by its location."""

from collections.abc import Callable
from pathlib import Path

from streamconv.files.address import Location, hub_file_url
from streamconv.files.base import File
from streamconv.files.local import LocalFile


def open_file(place: Location, notify: Callable[[str], None]) -> File:
    """A file, wherever it is; ``notify`` is told when a line breaks and is tried again.

    Raises:
        UsageError, SourceError: as `LocalFile`, `HttpFile` and `FsspecFile` say.
    """
    if isinstance(place, Path):
        return LocalFile(place)
    # Each is imported only when it is needed: a local conversion does without their memory.
    if place.scheme == "data":
        from streamconv.files.inline import InlineFile

        return InlineFile(place)
    if place.scheme in ("http", "https", "hf"):
        from streamconv.files.http import HttpFile

        return HttpFile(hub_file_url(place) if place.scheme == "hf" else place, notify)
    from streamconv.files.fsspec import FsspecFile

    return FsspecFile(place, notify)
