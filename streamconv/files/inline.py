"""A few bytes that are a file of their own: a ``data:`` address holds its contents (RFC 2397).

So a constant is read as everything else is, and a plan can name it as it names any file.
"""

import base64
from collections.abc import Iterable

from streamconv.errors import TruncatedError
from streamconv.files.address import Address
from streamconv.files.base import ByteRange, FileRef

_PREFIX = "data:;base64,"


def inline_ref(data: bytes) -> FileRef:
    """Name a file that holds ``data``."""
    return FileRef(Address(_PREFIX + base64.b64encode(data).decode()), len(data))


class InlineFile:
    """The open file of a ``data:`` address."""

    def __init__(self, address: Address):
        self._data = base64.b64decode(address.url.removeprefix(_PREFIX))
        self.ref = FileRef(address, len(self._data))
        self.name, self.where, self.size = address.name, str(address), len(self._data)

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Nothing to prepare."""

    def read_at(self, offset: int, buffer: memoryview) -> None:
        if offset + len(buffer) > self.size:
            raise TruncatedError(f"{self.where} ends at byte {self.size:,}.")
        buffer[:] = self._data[offset : offset + len(buffer)]

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_at(offset, memoryview(data))
        return bytes(data)

    def require_unchanged(self) -> None:
        """It cannot change."""

    def close(self) -> None:
        """Nothing to close."""
