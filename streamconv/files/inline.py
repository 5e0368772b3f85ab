"""A file of a few bytes whose URL contains them: a ``data:`` URL (RFC 2397).

With it, a constant is read like any other tensor, and a plan names it like any other file.
"""

import binascii
from collections.abc import Iterable

from streamconv.errors import TruncatedError
from streamconv.files.address import Address
from streamconv.files.base import ByteRange, FileRef

_PREFIX = "data:;base64,"


def inline_ref(data: bytes) -> FileRef:
    """Return the `FileRef` of a file that consists of ``data``."""
    return FileRef(Address(_PREFIX + binascii.b2a_base64(data, newline=False).decode()), len(data))


def is_inline(ref: FileRef) -> bool:
    return isinstance(ref.location, Address) and ref.location.url.startswith(_PREFIX)


class InlineFile:
    """The open file at a ``data:`` URL. Only URLs from `inline_ref` are supported."""

    def __init__(self, address: Address):
        self._data = binascii.a2b_base64(address.url.removeprefix(_PREFIX))
        self.ref = FileRef(address, len(self._data))
        self.name, self.where, self.size = address.name, str(address), len(self._data)

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Do nothing: all bytes are in memory."""

    def read_at(self, offset: int, buffer: memoryview) -> None:
        if offset + len(buffer) > self.size:
            raise TruncatedError(f"{self.where} ends at byte {self.size:,}.")
        buffer[:] = self._data[offset : offset + len(buffer)]

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_at(offset, memoryview(data))
        return bytes(data)

    def require_unchanged(self) -> None:
        """Do nothing: the contents are part of the URL."""

    def close(self) -> None:
        """Do nothing: no resource is held."""
