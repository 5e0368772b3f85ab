"""Computes the CRC-32 of a record from the CRC-32s of its pieces, which may be read in any order.

Python's zlib module computes the CRC-32 of a piece, but lacks crc32_combine. A CRC-32 is a polynomial over GF(2) modulo
`_POLYNOMIAL`; appending n bytes multiplies the CRC-32 of the preceding bytes by x^(8n).
"""

import zlib
from bisect import bisect_left, insort
from functools import lru_cache

from streamconv.errors import CorruptError, located
from streamconv.files.base import File
from streamconv.files.reader import Reader
from streamconv.tensors.expressions import Record, SourceTensor

_POLYNOMIAL = 0xEDB88320  # the polynomial of IEEE 802.3 with its bits reversed: the highest bit is x^0
_ONE, _X = 1 << 31, 1 << 30
_READ_BYTES = 128 << 10  # small, since a conversion's other buffers are in use at the same time
_MAX_OVERLAPS = 200  # earlier pieces that one may overlap; beyond that, its record is read again


def combine(first: int, second: int, second_length: int) -> int:
    """Return the CRC-32 of two concatenated byte strings, given the CRC-32 of each. ``second_length`` is in bytes."""
    return _multiply(_shift(second_length), first) ^ second


def crc_of_rest(whole: int, first: int, rest_length: int) -> int:
    """Return the CRC-32 of what follows the first bytes of a string: the inverse of `combine`.

    >>> crc_of_rest(zlib.crc32(b"header, data"), zlib.crc32(b"header, "), 4) == zlib.crc32(b"data")
    True
    """
    return _multiply(_shift(rest_length), first) ^ whole


@lru_cache(maxsize=1024)
def _shift(length: int) -> int:
    """Return x^(8 * length), by repeated squaring."""
    result, power, bits = _ONE, _X, 8 * length
    while bits:
        if bits & 1:
            result = _multiply(power, result)
        power = _multiply(power, power)
        bits >>= 1
    return result


def _multiply(a: int, b: int) -> int:
    product, bit = 0, _ONE
    while bit:
        if a & bit:
            product ^= b
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
        bit >>= 1
    return product


class RecordChecks:
    """Collects the CRC-32s of pieces as they are read, and compares whole records with their file's CRC-32."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._pieces: dict[Record, _Pieces] = {}  # incomplete records only
        self._names: dict[Record, str] = {}
        self._pending: set[Record] = set()
        self._verified: set[Record] = set()  # read once more, and matched

    def add(self, name: str, piece: SourceTensor, stored: memoryview | None) -> None:
        """Record that ``piece`` of the tensor ``name`` was read.

        If a contiguous piece overlaps an earlier one, `verify_pending` reads their record again.

        Args:
            stored: The bytes of ``piece.read_range`` as they are in the file; None if only the gathered values
                of a strided piece are available.

        Raises:
            CorruptError: the piece completes the record, and the record does not match its CRC-32.
        """
        record = piece.record
        if record.crc32 is None:
            return
        pieces = self._pieces.setdefault(record, _Pieces())
        self._names.setdefault(record, name)
        self._pending.add(record)
        if stored is None:
            return
        pieces.add(piece.offset, stored, may_overlap=not piece.is_contiguous)
        if pieces.size == record.range.length:
            self._require_match(record)
            self._pending.remove(record)
            del self._pieces[record]  # so that a second read of the record is checked, too

    def is_pending(self, record: Record) -> bool:
        """Return whether a part of the record was added, and its CRC-32 has not been compared since."""
        return record in self._pending

    def verify_pending(self) -> None:
        """Read each incomplete record once, as a whole, and compare its CRC-32.

        Raises:
            CorruptError: a record does not match. The message names its tensor and its position.
            ChangedError: the file was changed since it was opened.
        """
        for record in self._pending:
            file = self._reader.open(record.file)
            if record not in self._verified:
                file.prefetch((record.range,))
                self._require_match(record)
            file.require_unchanged()  # the record may have been verified several shards ago
        self._verified |= self._pending
        self._pending.clear()

    def skip_pending(self) -> None:
        """Forget the pending records: they are part of a resumed output, and an earlier process has verified them."""
        self._pending.clear()

    def _require_match(self, record: Record) -> None:
        file = self._reader.open(record.file)
        crc = self._pieces[record].crc(record.range.length)
        if (read_crc(record, file) if crc is None else crc) != record.crc32:
            file.require_unchanged()
            with located(record.file.location):
                raise CorruptError(
                    f"{file.name} is damaged: {self._names[record]} (record {record.name}, bytes "
                    f"{record.range.start:,} to {record.range.end:,}) does not match its CRC-32. Fetch the file again."
                )


class _Pieces:
    """The pieces of a record that were read: offset, length and CRC-32 of each, in order and without overlaps.

    ``size`` is their total length in bytes. If contiguous pieces overlap, or a piece overlaps too many, all pieces are
    dropped, and the record is read again to be checked.
    """

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[tuple[int, int, int]] = []
        self._is_kept = True

    def add(self, start: int, stored: memoryview, *, may_overlap: bool) -> None:
        """Add those of the ``stored`` bytes, which begin at the offset ``start``, that no earlier piece covers."""
        if not self._is_kept:
            return
        gaps = self._gaps(start, start + len(stored))
        if gaps is None or not (may_overlap or gaps == [(start, start + len(stored))]):
            self.size, self._pieces, self._is_kept = 0, [], False
            return
        for at, end in gaps:
            insort(self._pieces, (at, end - at, zlib.crc32(stored[at - start : end - start])))
            self.size += end - at

    def _gaps(self, start: int, end: int) -> list[tuple[int, int]] | None:
        """Return the ranges of [start, end) that no piece covers; None if too many pieces overlap it."""
        first = max(0, bisect_left(self._pieces, (start,)) - 1)
        gaps = []
        for offset, length, _ in self._pieces[first : first + _MAX_OVERLAPS]:
            if offset >= end:
                break
            if start < offset:
                gaps.append((start, offset))
            start = max(start, offset + length)
        else:
            if len(self._pieces) > first + _MAX_OVERLAPS:
                return None
        return [*gaps, (start, end)] if start < end else gaps

    def crc(self, size: int) -> int | None:
        """Return the CRC-32 of all pieces; None if they are not the whole record of ``size`` bytes."""
        if self.size != size:
            return None
        crc = 0
        for _, length, piece_crc in self._pieces:
            crc = combine(crc, piece_crc, length)
        return crc


def read_crc(record: Record, file: File) -> int:
    """Compute the CRC-32 of a record by reading it."""
    crc, buffer = 0, memoryview(bytearray(_READ_BYTES))
    for at in range(record.range.start, record.range.end, _READ_BYTES):
        part = buffer[: min(_READ_BYTES, record.range.end - at)]
        file.read_at(at, part)
        crc = zlib.crc32(part, crc)
    return crc
