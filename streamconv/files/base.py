"""A file to those who read it, wherever it is: what names it, and what it can do while it is open."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from streamconv.files.address import Location

Version = tuple[tuple[str, str | int | None], ...]
"""What tells a file from another one of the same name and size, such as its times or a server's ETag, sorted by key."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``length`` bytes from ``start`` on."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file by location, size in bytes and version: pure data, to be kept, compared and sent to another process."""

    location: Location
    size: int
    version: Version = ()

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.location.name


class File(Protocol):
    """An open file. ``where`` is its location as the user gave it, for messages."""

    @property
    def ref(self) -> FileRef: ...

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def where(self) -> str: ...

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Announce what `read_at` will be asked for next, in that order. Anything else may be read in between."""

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on, or raise `SourceError`."""

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes from ``offset`` on; errors as for `read_at`."""

    def require_unchanged(self) -> None:
        """Raise `ChangedError` if the file is not the one that was opened."""

    def close(self) -> None: ...
