"""Computes the CRC-32 of a record from the CRC-32s of its ranges, which may be read in any order.

Python's zlib module computes the CRC-32 of a range, but lacks crc32_combine. A CRC-32 is a polynomial over GF(2) modulo
`_POLYNOMIAL`; appending n bytes multiplies the CRC-32 of the preceding bytes by x^(8n).
"""

import zlib
from bisect import bisect
from collections.abc import Callable
from functools import lru_cache, partial

from streamconv.errors import CorruptError, located
from streamconv.files.base import File
from streamconv.files.reader import Reader
from streamconv.tensors.expressions import Record

_POLYNOMIAL = 0xEDB88320  # the polynomial of IEEE 802.3 with its bits reversed: the highest bit is x^0
_ONE, _X = 1 << 31, 1 << 30
_READ_BYTES = 128 << 10  # small, since a conversion's other buffers are in use at the same time


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
    """Collects the CRC-32s of ranges as they are read, and compares whole records with their file's CRC-32."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._read: dict[Record, _Ranges] = {}  # incomplete records only
        self._names: dict[Record, str] = {}
        self._pending: set[Record] = set()
        self._verified: set[Record] = set()  # read once more, and matched

    def add(self, name: str, record: Record, start: int, stored: memoryview | None) -> None:
        """Record that bytes of a record were read for the tensor ``name``.

        Args:
            start: The offset of the bytes in the record.
            stored: The bytes as they are in the file; None if they are not available in one piece. `verify_pending`
                then reads the record again.

        Raises:
            CorruptError: the bytes complete the record, and it does not match its CRC-32.
        """
        if record.crc32 is None:
            return
        ranges = self._read.setdefault(record, _Ranges())
        self._names.setdefault(record, name)
        self._pending.add(record)
        if stored is None:
            return
        ranges.add(start, stored)
        self._compare_if_complete(record)

    def add_crc(self, name: str, record: Record, start: int, length: int, crc: int) -> None:
        """Record the CRC-32 of bytes of a record that did not pass through this process; see `add`.

        None of these bytes may have been added before, since the last time that all bytes of the record were.
        """
        ranges = self._read.setdefault(record, _Ranges())
        self._names.setdefault(record, name)
        self._pending.add(record)
        ranges.add_crc(start, start + length, crc)
        self._compare_if_complete(record)

    def _compare_if_complete(self, record: Record) -> None:
        if self._read[record].crc_of(record.range.length) is not None:
            self._require_match(record)
            self._pending.remove(record)
            del self._read[record]  # so that a second read of the record is checked, too

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

    def forget_ranges(self) -> None:
        """Forget which ranges were read, because some of their bytes were wrong; their records stay pending."""
        self._read.clear()

    def skip_pending(self) -> None:
        """Forget the pending records: they are part of a resumed output, and an earlier process has verified them."""
        self._pending.clear()

    def _require_match(self, record: Record) -> None:
        file = self._reader.open(record.file)
        crc = self._read[record].crc_of(record.range.length) if record in self._read else None
        if (read_crc(record, file) if crc is None else crc) != record.crc32:
            file.require_unchanged()
            with located(record.file.location):
                raise CorruptError(
                    f"{file.name} is damaged: {self._names[record]} (record {record.name}, bytes "
                    f"{record.range.start:,} to {record.range.end:,}) does not match its CRC-32. Fetch the file again."
                )


class _Ranges:
    """The ranges of a record that were read, with their CRC-32s. Those that meet become one."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, int]] = []  # start, end, CRC-32; sorted

    def add(self, start: int, stored: memoryview) -> None:
        """Add the bytes from ``start`` on; those that were added before do not count again."""
        for first, last in self._uncovered(start, start + len(stored)):
            self._insert(first, last, partial(zlib.crc32, stored[first - start : last - start]))

    def add_crc(self, start: int, end: int, crc: int) -> None:
        """Add bytes that are in none of the ranges, by their CRC-32."""
        self._insert(start, end, lambda before: combine(before, crc, end - start))

    def crc_of(self, length: int) -> int | None:
        """Return the CRC-32 of the first ``length`` bytes; None if some of them were not read."""
        if length == 0:
            return 0
        start, end, crc = self._ranges[0] if self._ranges else (0, 0, 0)
        return crc if (start, end) == (0, length) else None

    def _uncovered(self, start: int, end: int) -> list[tuple[int, int]]:
        found = []
        for at in range(max(0, bisect(self._ranges, (start,)) - 1), len(self._ranges)):
            first, last, _ = self._ranges[at]
            if first >= end:
                break
            if start < first:
                found.append((start, first))
            start = max(start, last)
        return [*found, (start, end)] if start < end else found

    def _insert(self, start: int, end: int, continued: Callable[[int], int]) -> None:
        """Insert a range. ``continued`` returns the CRC-32 of the bytes before it and of its own, given the former."""
        at, before = bisect(self._ranges, (start,)), 0
        if at and self._ranges[at - 1][1] == start:
            at -= 1
            start, _, before = self._ranges.pop(at)
        crc = continued(before)
        if at < len(self._ranges) and self._ranges[at][0] == end:
            first, end, after = self._ranges.pop(at)
            crc = combine(crc, after, end - first)
        self._ranges.insert(at, (start, end, crc))


def read_crc(record: Record, file: File) -> int:
    """Compute the CRC-32 of a record by reading it."""
    crc, buffer = 0, memoryview(bytearray(_READ_BYTES))
    for at in range(record.range.start, record.range.end, _READ_BYTES):
        part = buffer[: min(_READ_BYTES, record.range.end - at)]
        file.read_at(at, part)
        crc = zlib.crc32(part, crc)
    return crc
