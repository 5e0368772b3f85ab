"""Cuts tensors into tiles: parts of consecutive values that are evaluated one after another in bounded memory.

A contiguous read is cut into small pieces, which are read straight into their place. Any other expression is cut into
boxes along its first dimensions. A box fits into the processor's cache, or is large if its values are scattered in the
file: a column of a large matrix is read in as many runs for one row of its transpose as for a thousand.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from streamconv.tensors.computed import Cast
from streamconv.tensors.concatenation import Concat, reshape
from streamconv.tensors.expressions import Expression, Read
from streamconv.tensors.runs import Block, in_memory, runs_of, source_blocks

PIECE_BYTES = 512 << 10  # read and written at once; small enough to stay in a CPU's cache
MAX_TILE_BYTES = 32 << 20  # of a tile, and of what is read for it
# The time that another run and another tile take, as a number of bytes that could be copied in it.
_RUN_BYTES, _TILE_BYTES = 8 << 10, 128 << 10
# What is read for a tile stays in the cache up to this size; more takes longer by this factor.
_CACHE_BYTES, _SLOWER = 4 << 20, 1.5


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the values of a tile, in row-major order.

    ``blocks`` are read for the tile, and ``values`` is evaluated from there, where its leaves are; the parts of one
    tile have the same object. A contiguous read has no blocks, since it is read straight into its place.
    """

    blocks: tuple[Block, ...]
    values: Expression


def parts(tensor: Expression) -> Iterator[Part]:
    """Cut a tensor into parts of at most `PIECE_BYTES`, as read and as written, in row-major order."""
    for tile in tiles(tensor):
        if (read := contiguous_read(tile)) is not None:
            count, step = math.prod(tile.shape), PIECE_BYTES // max(read.info.itemsize, tile.info.itemsize)
            flat = reshape(tile, (count,))
            yield from (Part((), flat.narrow(0, at, min(step, count - at))) for at in range(0, count, step))
        else:
            blocks = source_blocks(tile)
            yield from (Part(blocks, box) for box in _boxes(in_memory(tile, blocks)))


def contiguous_read(tensor: Expression) -> Read | None:
    """Return the contiguous read that a tensor is, perhaps cast; None if it is another expression."""
    read = tensor.of if isinstance(tensor, Cast) else tensor
    return read if isinstance(read, Read) and read.is_contiguous else None


def is_gathered(tensor: Expression) -> bool:
    """Return whether values must be put in order, which takes numpy: not for contiguous reads and constants."""
    if contiguous_read(tensor) is not None or (isinstance(tensor, Read) and tensor.is_constant):
        return False
    return not _is_in_rows(tensor) or any(map(is_gathered, tensor.operands))


def _is_in_rows(tensor: Expression) -> bool:
    """Return whether the parts of a tensor are its values in row-major order, one after another."""
    return isinstance(tensor, Concat) and all(size == 1 for size in tensor.shape[: tensor.dim])


def tiles(tensor: Expression) -> Iterator[Expression]:
    """Yield the tiles of a tensor in row-major order. One that is a contiguous read may have any size."""
    if not tensor.info.nbytes:
        return
    if contiguous_read(tensor) is not None:
        yield tensor
        return
    if not tensor.shape:
        tensor = reshape(tensor, (1,))
    lead = next((dim for dim, size in enumerate(tensor.shape) if size != 1), 0)
    if _is_in_rows(tensor) and not any(map(is_gathered, tensor.operands)):
        for part in tensor.operands:
            yield from tiles(part)
        return
    count = _rows_at_once(tensor, lead)
    for at in range(0, tensor.shape[lead], count):
        rows = tensor.narrow(lead, at, min(count, tensor.shape[lead] - at))
        yield from (rows,) if math.isfinite(cost(rows)) else tiles(rows)


def _rows_at_once(tensor: Expression, dim: int) -> int:
    """Return how many rows along ``dim`` make the cheapest tile, judged by the first rows; 1 if each is too large."""
    count = max(1, min(tensor.shape[dim], MAX_TILE_BYTES * tensor.shape[dim] // tensor.info.nbytes))
    counts = [count >> i for i in range(count.bit_length())]
    least, found = min((cost(tensor.narrow(dim, 0, count)), -count) for count in counts)
    return -found if math.isfinite(least) else 1


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
    """Return how long a tile takes, relative to a copy of its bytes; infinite if it is too large to be a tile.

    A tile and what is read for it are in memory as a whole, so both are limited by `MAX_TILE_BYTES`.
    """
    size, held, starts = tile.info.nbytes, 0, 0
    if size > MAX_TILE_BYTES:
        return math.inf
    for leaf in tile.leaves():
        runs = runs_of(leaf)
        held, starts = held + runs.held_bytes, starts + runs.count
        if held > MAX_TILE_BYTES:
            return math.inf
    return (_TILE_BYTES + held * (_SLOWER if held > _CACHE_BYTES else 1) + starts * _RUN_BYTES) / size
