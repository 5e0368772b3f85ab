"""Plans the reads of a tile: the ranges of records that its leaves need, each once, and their places in memory."""

import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from streamconv.files.base import ByteRange
from streamconv.files.inline import inline_ref
from streamconv.tensors.expressions import Expression, Read, Record

_DENSE_BYTES = 8 << 20  # a tensor that spans at most this is read with its gaps
_GAP_BYTES = 8 << 10  # reading a gap of this size takes as long as another call
_ALIGNMENT = 8  # of elements in memory
MEMORY = Record(inline_ref(b""), "memory", ByteRange(0, 0))


@dataclass(frozen=True, slots=True)
class Runs:
    """The bytes that a strided read needs: runs of ``length`` bytes, the first from ``start`` on in the file.

    ``steps`` are pairs of a count and a distance in bytes, the largest distance first. ``dims`` are the dimensions that
    they belong to; the runs hold the others. ``has_gaps``: there are other bytes between the runs, or in them.
    """

    start: int
    length: int
    steps: tuple[tuple[int, int], ...]
    dims: tuple[int, ...]
    has_gaps: bool

    @property
    def count(self) -> int:
        return math.prod(count for count, _ in self.steps)

    @property
    def nbytes(self) -> int:
        """The number of bytes that are read."""
        return self.count * self.length

    @property
    def held_bytes(self) -> int:
        """The number of bytes that they take in memory."""
        return -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT

    @property
    def span(self) -> ByteRange:
        """The range from the first byte to the last."""
        return ByteRange(self.start, sum((count - 1) * step for count, step in self.steps) + self.length)

    def starts(self) -> Iterator[int]:
        """Yield where each run starts, in the order in which they are kept."""
        *outer, (count, step) = self.steps
        for each in product(*(range(0, count * step, step) for count, step in outer)):
            first = self.start + sum(each)
            yield from range(first, first + count * step, step)


@lru_cache(maxsize=1024)
def runs_of(read: Read) -> Runs:
    """Return the runs in which a strided tensor is read; small gaps are read, too."""
    itemsize = read.info.itemsize
    dims = sorted((s * itemsize, n, d) for d, (n, s) in enumerate(zip(read.shape, read.strides, strict=True)) if n > 1)
    length = itemsize if read.info.nbytes else 0
    steps: list[tuple[int, int]] = []
    outer: list[int] = []
    is_small, has_gaps = read.span <= _DENSE_BYTES, False
    for step, count, dim in dims:
        gap = step - length
        has_gaps |= gap > 0
        if not outer and (gap <= length or (gap <= _GAP_BYTES and is_small)):
            length += (count - 1) * step
        else:
            steps.append((count, step))
            outer.append(dim)
    start = read.record.range.start + read.offset
    return Runs(start, length, tuple(reversed(steps)), tuple(reversed(outer)), has_gaps)


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of a record that are read for a tile, and kept at the offset ``at`` in its memory."""

    record: Record
    runs: Runs
    at: int


def source_blocks(tile: Expression) -> tuple[Block, ...]:
    """Return the blocks that are read for a tile. Those of one run each do not overlap."""
    whole: dict[Record, list[Runs]] = {}
    scattered: dict[tuple[Record, Runs], None] = {}
    for leaf in tile.leaves():
        runs = runs_of(leaf)
        if runs.steps:
            scattered[leaf.record, runs] = None
        elif runs.length:
            whole.setdefault(leaf.record, []).append(runs)
    found = [(record, runs) for record, each in whole.items() for runs in _merged(each)]
    blocks, at = [], 0
    for record, runs in (*found, *scattered):
        blocks.append(Block(record, runs, at))
        at += runs.held_bytes
    return tuple(blocks)


def _merged(each: list[Runs]) -> list[Runs]:
    merged: list[Runs] = []
    for runs in sorted(each, key=lambda runs: runs.start):
        if merged and runs.start <= merged[-1].start + merged[-1].length:
            end = max(merged[-1].start + merged[-1].length, runs.start + runs.length)
            has_gaps = merged[-1].has_gaps or runs.has_gaps
            merged[-1] = replace(merged[-1], length=end - merged[-1].start, has_gaps=has_gaps)
        else:
            merged.append(runs)
    return merged


def in_memory(tile: Expression, blocks: tuple[Block, ...]) -> Expression:
    """Return the tile with leaves that point to the memory of its blocks, the record `MEMORY`."""
    whole: dict[Record, list[Block]] = {}  # sorted by where they start
    scattered: dict[tuple[Record, Runs], Block] = {}
    for block in blocks:
        if block.runs.steps:
            scattered[block.record, block.runs] = block
        else:
            whole.setdefault(block.record, []).append(block)

    def kept(read: Read) -> Read:
        runs = runs_of(read)
        if not runs.length:
            return read
        if not runs.steps:
            each = whole[read.record]
            block = each[bisect(each, runs.start, key=lambda block: block.runs.start) - 1]
            return replace(read, record=MEMORY, offset=block.at + runs.start - block.runs.start)
        strides, size = [*read.strides], runs.length
        for dim, (count, _) in reversed([*zip(runs.dims, runs.steps, strict=True)]):
            strides[dim], size = size // read.info.itemsize, size * count
        return replace(read, record=MEMORY, offset=scattered[read.record, runs].at, strides=tuple(strides))

    return tile.map_leaves(kept)
