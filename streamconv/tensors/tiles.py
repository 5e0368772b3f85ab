"""Cuts tensors into tiles: parts of consecutive values that are evaluated one after another in bounded memory.

A contiguous read is cut into small pieces, which are read straight into their place. Any other expression is cut into
boxes along its first dimensions. A box is as small as the processor's cache likes, or large if its values are scattered
in the file: a column of a large matrix is read in as many runs for one row of its transpose as for a thousand.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from streamconv.files.base import ByteRange, FileRef
from streamconv.tensors.expressions import Cast, Concat, Expression, Read
from streamconv.tensors.runs import Block, in_memory, runs_of, source_blocks

PIECE_BYTES = 512 << 10  # read and written at once; small enough to stay in a CPU's cache
MAX_TILE_BYTES = 32 << 20  # of a tile, and of what is read for it
# What takes as long as reading so many bytes: another run, and another tile.
_RUN_BYTES, _TILE_BYTES = 8 << 10, 128 << 10
_CACHE_BYTES, _SLOWER = 4 << 20, 1.5  # what is read for a tile stays in the cache; how much longer it takes otherwise


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the values of a tile, in row-major order.

    ``blocks`` are read for the tile, and ``values`` is evaluated from there, where its leaves are. A contiguous read
    has no blocks, since it is read straight into its place. ``is_first``: it is the first part of its tile.
    """

    blocks: tuple[Block, ...]
    values: Expression
    is_first: bool = True

    @property
    def read_bytes(self) -> int:
        """The bytes that are read when it is evaluated after the parts before it."""
        if self.blocks:
            return sum(block.runs.nbytes for block in self.blocks) if self.is_first else 0
        return sum(leaf.info.nbytes for leaf in self.values.leaves())


def parts(tensor: Expression) -> Iterator[Part]:
    """Cut a tensor into parts of at most `PIECE_BYTES`, as read and as written, in row-major order."""
    for tile in tiles(tensor):
        if direct(tile) is not None:
            yield Part((), tile)
        else:
            blocks = source_blocks(tile)
            for i, box in enumerate(_boxes(in_memory(tile, blocks))):
                yield Part(blocks, box, i == 0)


def reads_of(part: Part) -> Iterator[tuple[FileRef, ByteRange]]:
    """Yield what is read for a part that follows the parts before it; of scattered runs, their whole record.

    A record on another machine is read once for all of its runs.
    """
    if not part.blocks:
        yield from ((leaf.record.file, leaf.range) for leaf in part.values.leaves())
    for block in part.blocks if part.is_first else ():
        yield block.record.file, block.record.range if block.runs.steps else block.runs.span


def direct(tensor: Expression) -> Read | None:
    """Return the contiguous read that a tensor is, perhaps cast; None if it is another expression."""
    read = tensor.of if isinstance(tensor, Cast) else tensor
    return read if isinstance(read, Read) and read.is_contiguous else None


def tiles(tensor: Expression) -> Iterator[Expression]:
    """Yield the tiles of a tensor in row-major order."""
    if not tensor.info.nbytes:
        return
    if (read := direct(tensor)) is not None:
        count = math.prod(tensor.shape)
        flat = tensor.reshape((count,))
        step = PIECE_BYTES // max(read.info.itemsize, tensor.info.itemsize)
        yield from (flat.narrow(0, at, min(step, count - at)) for at in range(0, count, step))
        return
    lead = next((dim for dim, size in enumerate(tensor.shape) if size != 1), 0)
    if isinstance(tensor, Concat) and tensor.dim == lead and all(direct(part) is not None for part in tensor.parts):
        for part in tensor.parts:
            yield from tiles(part)
        return
    if not math.isfinite(cost(tensor.narrow(lead, 0, 1))):
        for i in range(tensor.shape[lead]):
            yield from tiles(tensor.narrow(lead, i, 1))
        return
    size, at, count = tensor.shape[lead], 0, _rows_at_once(tensor, lead)
    while at < size:
        count = min(count, size - at)
        while count > 1 and not math.isfinite(cost(tensor.narrow(lead, at, count))):
            count -= count // 2
        yield tensor.narrow(lead, at, count)
        at += count


def _rows_at_once(tensor: Expression, dim: int) -> int:
    """Return how many rows along ``dim`` make the tile that costs least, judged by the first rows."""
    count = max(1, min(tensor.shape[dim], MAX_TILE_BYTES * tensor.shape[dim] // tensor.info.nbytes))
    counts = [count >> i for i in range(count.bit_length())]
    return min(counts, key=lambda count: (cost(tensor.narrow(dim, 0, count)), -count))


def _boxes(tensor: Expression) -> Iterator[Expression]:
    """Cut a tensor into boxes of at most `PIECE_BYTES`."""
    size = tensor.info.nbytes
    if size <= PIECE_BYTES:
        yield tensor
        return
    dim = next(dim for dim, size in enumerate(tensor.shape) if size != 1)
    row = size // tensor.shape[dim]
    for at in range(0, tensor.shape[dim], step := max(1, PIECE_BYTES // row)):
        box = tensor.narrow(dim, at, min(step, tensor.shape[dim] - at))
        yield from _boxes(box)


def cost(tile: Expression) -> float:
    """Return how long a tile takes, in bytes that could be copied instead of each of its own; infinite if it is none.

    A tile is in memory as a whole, so what is too large for that is none.
    """
    size, held, starts = tile.info.nbytes, 0, 0
    if size > MAX_TILE_BYTES:
        return math.inf
    for leaf in tile.leaves():
        runs = runs_of(leaf)
        held, starts = held + runs.nbytes, starts + runs.count
        if held > MAX_TILE_BYTES:
            return math.inf
    return (_TILE_BYTES + held * (_SLOWER if held > _CACHE_BYTES else 1) + starts * _RUN_BYTES) / size
