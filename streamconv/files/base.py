"""What a file is to those who read it, wherever it is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ByteRange:
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class ByteSource(Protocol):
    """A file, wherever it is, that can be read at an offset."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def prefetch(self, ranges: "Iterable[ByteRange]") -> None:
        """Be told what `read_at` will be asked for next, and in which order."""

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on, or raise `SourceError`."""

    def require_unchanged(self) -> None:
        """Raise `ChangedError` where it is not as it was opened."""


class File(ByteSource, Protocol):
    """What a checkpoint is read from.

    ``where`` is its place for messages; ``version`` tells this file from another one of the same name
    and size, as far as anything does.
    """

    @property
    def where(self) -> str: ...

    @property
    def version(self) -> Mapping[str, object]: ...

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on; errors as `read_at`'s."""

    def close(self) -> None: ...
