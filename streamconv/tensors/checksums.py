"""CRC-32 of a record from the CRC-32s of its pieces, read in any order.

zlib computes a piece's; Python's zlib module lacks crc32_combine. A CRC-32 is a polynomial over
GF(2) modulo `_POLYNOMIAL`, so appending n bytes multiplies what came before by x^(8n).
"""

import zlib
from functools import lru_cache

from streamconv.errors import CorruptError
from streamconv.tensors.expressions import Record, SourceTensor

_POLYNOMIAL = 0xEDB88320  # IEEE 802.3's, bits reversed: the highest bit is x^0
_ONE, _X = 1 << 31, 1 << 30
_READ_BYTES = 128 << 10  # a piece of any record, on top of all that a conversion needs


def combine(first: int, second: int, second_length: int) -> int:
    """The CRC-32 of two byte strings joined, from theirs. ``second_length`` is in bytes."""
    return _multiply(_shift(second_length), first) ^ second


@lru_cache(maxsize=1024)
def _shift(length: int) -> int:
    """x^(8 * length), by squaring."""
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
    """Collects the CRC-32s of pieces as they are read, and holds whole records against the file's."""

    def __init__(self) -> None:
        self._pieces: dict[Record, list[tuple[int, int, int]]] = {}  # of records that are not complete
        self._names: dict[Record, str] = {}
        self._touched: set[Record] = set()  # since `verify_pending` was last called
        self._settled: set[Record] = set()

    def add(self, name: str, piece: SourceTensor, data: memoryview) -> None:
        """Take note of ``data``, the bytes of ``piece``, which belongs to the tensor ``name``.

        A piece that is added twice costs `verify_pending` a reading of its record.

        Raises:
            CorruptError: with them, the record is complete, and does not match its CRC-32.
        """
        record = piece.record
        if record.crc32 is None:
            return
        pieces = self._pieces.setdefault(record, [])
        self._names.setdefault(record, name)
        self._touched.add(record)
        if piece.is_contiguous:
            pieces.append((piece.offset, len(data), zlib.crc32(data)))
            is_last = piece.offset + len(data) == record.range.length
            if is_last and sum(length for _, length, _ in pieces) == record.range.length:
                self._require_match(record)
                self._touched.remove(record)
                del self._pieces[record]  # who reads it once more is checked once more

    def is_open(self, record: Record) -> bool:
        """Whether something of it was added that neither completed it nor was settled."""
        return record in self._touched

    def verify_pending(self) -> None:
        """Check what was added of records that are not complete: these are read once, whole, and must stay as they are.

        Raises:
            CorruptError: names the tensor and its place in the file.
        """
        for record in self._touched:
            if record not in self._settled:
                record.file.prefetch((record.range,))
                self._require_match(record)
            record.file.require_unchanged()  # since it was read whole, which may be shards ago
        self._settled |= self._touched
        self._touched.clear()

    def skip_pending(self) -> None:
        """Instead of `verify_pending`, for what was settled in an earlier process: all of it came from the output."""
        self._touched.clear()

    def _require_match(self, record: Record) -> None:
        if _crc_of(record, self._pieces[record]) != record.crc32:
            record.file.require_unchanged()
            raise CorruptError(
                f"{record.file.name} is damaged: {self._names[record]} (record {record.name}, bytes "
                f"{record.range.start:,} to {record.range.end:,}) does not match its CRC-32. Fetch the file again."
            )


def _crc_of(record: Record, pieces: list[tuple[int, int, int]]) -> int:
    crc, at = 0, 0
    for offset, length, piece_crc in sorted(pieces):
        if offset != at:
            return read_crc(record)
        crc, at = combine(crc, piece_crc, length), at + length
    return crc if at == record.range.length else read_crc(record)


def read_crc(record: Record) -> int:
    """Of its bytes, read now."""
    crc, buffer = 0, memoryview(bytearray(_READ_BYTES))
    for at in range(record.range.start, record.range.end, _READ_BYTES):
        part = buffer[: min(_READ_BYTES, record.range.end - at)]
        record.file.read_at(at, part)
        crc = zlib.crc32(part, crc)
    return crc
