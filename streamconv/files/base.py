"""The interface of a file, wherever it is: what identifies it, and what can be done while it is open."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from streamconv.files.address import Location

_ADDED_TO_ETAG = re.compile(r"""^W/|(--?|;)(gzip|br|zstd|deflate)(?="$)""")

Version = tuple[tuple[str, str | int | None], ...]
"""Distinguishes a file from another one of the same name and size, by its times or a server's ETag. Sorted by key."""

UNVERSIONED = "opened_ns"
"""The key of the time of opening, in nanoseconds since 1970: it is the version of a file whose server names none."""


def is_same_version(one: Mapping[str, str | int | None], other: Mapping[str, str | int | None]) -> bool:
    """Return whether two responses name the same version of a file, by the best of what both name.

    That is the hash that the Hub gives for a file in its store ("linked_etag"), an ETag, or else a time.
    """
    for key in ("linked_etag", "etag", "last_modified"):
        if one.get(key) and other.get(key):
            return _plain(one[key]) == _plain(other[key])
    return one == other


def _plain(validator: object) -> str:
    """Remove from an ETag what some servers add to it: a mark of weakness, and a suffix for an encoding."""
    return _ADDED_TO_ETAG.sub("", str(validator))


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``length`` bytes, from the offset ``start`` to the offset ``end``, which is not included."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file by location, size in bytes and version. Pure data: it can be stored, compared and sent to a process."""

    location: Location
    size: int
    version: Version = ()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.location.name


class File(Protocol):
    """An open file. ``where`` is its location as the user gave it, for messages; ``size`` is in bytes."""

    @property
    def ref(self) -> FileRef: ...

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def where(self) -> str: ...

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Announce the next reads, in order. Other ranges may be read in between."""

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on, or raise `SourceError`."""

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes from ``offset`` on; raises what `read_at` raises."""

    def require_unchanged(self) -> None:
        """Raise `ChangedError` if the file is not the one that was opened."""

    def close(self) -> None: ...
