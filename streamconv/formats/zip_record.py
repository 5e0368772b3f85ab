"""Reads a record of a zip, whole or in pieces, and checks its CRC-32."""

import zlib
from hashlib import sha256

from streamconv.errors import CorruptError, SourceError
from streamconv.files.base import File
from streamconv.formats.limits import MAX_TENSORS
from streamconv.tensors.expressions import Record

_PIECE_BYTES = 512 << 10


def read_record(file: File, record: Record, max_bytes: int) -> bytes:
    """Read a whole record of at most ``max_bytes``, and check its CRC-32."""
    pieces = RecordPieces(file, record, max_bytes)
    data = pieces.read(record.range.length)
    pieces.finish()
    return data


class RecordPieces:
    """Reads a record of at most ``max_bytes`` piece by piece. ``digest`` is the sha256 of what was read."""

    def __init__(self, file: File, record: Record, max_bytes: int):
        if record.range.length > max_bytes:
            raise SourceError(
                f"{file.where}: its record {record.name} has {record.range.length:,} bytes, and streamconv reads up to "
                f"{max_bytes:,}: {MAX_TENSORS:,} tensors need no more. Do not trust this file."
            )
        self._file, self._record, self._at, self._crc32 = file, record, record.range.start, 0
        self.digest = sha256()
        if record.range.length > _PIECE_BYTES:
            file.prefetch([record.range])

    def read(self, count: int) -> bytes:
        """Read the next piece: at least ``count`` bytes, unless the record ends before."""
        data = self._file.read(self._at, min(max(count, _PIECE_BYTES), self._record.range.end - self._at))
        self._at, self._crc32 = self._at + len(data), zlib.crc32(data, self._crc32)
        self.digest.update(data)
        return data

    def finish(self) -> None:
        """Read the rest, and check the CRC-32.

        Raises:
            CorruptError: it does not match.
        """
        while self.read(0):
            pass
        if self._record.crc32 not in (None, self._crc32):
            raise CorruptError(
                f"{self._file.where}: its record {self._record.name} does not match its CRC-32: the file is damaged. "
                "Fetch it again."
            )
