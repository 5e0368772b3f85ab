"""The parts of a multipart upload some of whose bytes the store copies itself. Pure numbers, no I/O.

S3 accepts parts of at least 5 MiB, except for the last one, and at most 10,000 of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

MIN_PART_BYTES = 5 << 20
MAX_COPY_BYTES = 512 << 20  # of one part; S3 takes up to 5 GiB, but several parts are copied at once
MAX_PARTS = 10_000
ALIGNMENT = 16  # bytes; the largest element of a tensor, so that no element is cut


@dataclass(frozen=True, slots=True)
class PartRange:
    """A part, from the offset ``start`` of the file to the offset ``end``. ``is_copied``: the store has its bytes."""

    start: int
    end: int
    is_copied: bool

    @property
    def length(self) -> int:
        return self.end - self.start


def least_part_bytes(size: int) -> int:
    """Return the least size of all parts but the last, so that S3 accepts each, and they are not too many."""
    return max(MIN_PART_BYTES, -(-size // (MAX_PARTS - 1)))


def uploaded_part_bytes(size: int, wanted: int) -> int:
    """Return the size of uploaded parts for `lay_out_parts`: the ``wanted`` one if it is possible."""
    return max(wanted, least_part_bytes(size) + ALIGNMENT)


def lay_out_parts(size: int, copyable: Sequence[tuple[int, int]], part_bytes: int) -> list[PartRange]:
    """Cut a file of ``size`` bytes into parts.

    A range that follows too few bytes for a part gives them its own beginning, which is uploaded then. It is copied if
    at least ``part_bytes`` of it remain.

    Args:
        copyable: The ranges that can be copied, as offsets of their start and end, sorted. They may touch.
        part_bytes: The size of the parts that are uploaded, from `uploaded_part_bytes`. The last one before a copied
            part may be smaller.

    >>> MiB = 1 << 20
    >>> [(p.start // MiB, p.end // MiB, p.is_copied) for p in lay_out_parts(40 * MiB, [(1 * MiB, 31 * MiB)], 8 * MiB)]
    [(0, 5, False), (5, 31, True), (31, 39, False), (39, 40, False)]
    """
    least = least_part_bytes(size)
    parts: list[PartRange] = []
    at = 0  # everything before it has a part
    for start, end in copyable:
        rest = (start - at) % part_bytes
        begin = start + (-(-(least - rest) // ALIGNMENT) * ALIGNMENT if 0 < rest < least else 0)
        if end - begin >= part_bytes:
            parts += _uploaded(at, begin, part_bytes)
            parts += _copied(begin, end, max(MAX_COPY_BYTES, 2 * least))
            at = end
    return [*parts, *_uploaded(at, size, part_bytes)]


def _uploaded(start: int, end: int, part_bytes: int) -> Iterator[PartRange]:
    for at in range(start, end, part_bytes):
        yield PartRange(at, min(at + part_bytes, end), False)


def _copied(start: int, end: int, most: int) -> Iterator[PartRange]:
    count = -(-(end - start) // most)
    cuts = [start + (end - start) * i // count // ALIGNMENT * ALIGNMENT for i in range(count)]
    yield from (PartRange(first, last, True) for first, last in pairwise([*cuts, end]))
