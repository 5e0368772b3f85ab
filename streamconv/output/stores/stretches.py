"""Decides which ranges of a weight file a store can copy from the source. Pure data, no I/O.

A range is copied only if the file takes all bytes of its record exactly once, and the record has a CRC-32: then the
CRC-32s of what is copied and of what is uploaded, combined, must match it, and no copied byte remains unchecked.
"""

from collections.abc import Callable
from dataclasses import dataclass

from streamconv.files.base import FileRef
from streamconv.output.contents import Segments
from streamconv.output.stores.part_layout import PartRange, lay_out_parts
from streamconv.planning.shards import Shard
from streamconv.tensors.concatenation import reshape
from streamconv.tensors.expressions import Expression, Read, Record
from streamconv.tensors.tiles import contiguous_read


@dataclass(frozen=True)
class CopiedRange:
    """A part of the tensor ``name`` that the store copies: a contiguous ``read``."""

    name: str
    read: Read


Stretch = Segments | CopiedRange
"""Consecutive bytes of a file: segments to upload, or a part to copy."""


def cut_into_stretches(shard: Shard, can_copy: Callable[[FileRef], bool], part_bytes: int) -> list[Stretch]:
    """Cut a file into what is uploaded and what is copied; return nothing if nothing can be copied.

    Args:
        can_copy: Returns whether the store has a file of the source.
        part_bytes: The size of the parts that are uploaded.
    """
    placed, at = [], len(shard.header)
    for name, tensor in shard.tensors:
        placed.append((at, name, tensor))
        at += tensor.info.nbytes
    tiled = _tiled_records(shard)
    copyable = {
        at: tensor
        for at, _, tensor in placed
        if isinstance(tensor, Read) and tensor.record in tiled and can_copy(tensor.record.file)
    }
    ranges = [(at, at + tensor.info.nbytes) for at, tensor in copyable.items()]
    parts = lay_out_parts(shard.size, ranges, part_bytes)
    if not any(part.is_copied for part in parts):
        return []
    found: list[Stretch] = []
    uploaded: list[PartRange] = []
    for part in parts:
        if not part.is_copied:
            uploaded.append(part)
            continue
        if uploaded:
            found.append(_segments(shard, placed, uploaded[0].start, uploaded[-1].end))
            uploaded = []
        at, name = next((at, name) for at, name, t in reversed(placed) if at <= part.start and t.info.nbytes)
        found.append(CopiedRange(name, _slice(copyable[at], part.start - at, part.length)))
    if uploaded:
        found.append(_segments(shard, placed, uploaded[0].start, uploaded[-1].end))
    return found


def _tiled_records(shard: Shard) -> set[Record]:
    """Return the records with a CRC-32 all of whose bytes the file takes, each exactly once and as they are."""
    reads: dict[Record, list[tuple[int, int]]] = {}
    others: set[Record] = set()
    for _, tensor in shard.tensors:
        for leaf in tensor.leaves():
            if leaf is tensor and contiguous_read(leaf) is not None:
                reads.setdefault(leaf.record, []).append((leaf.offset, leaf.offset + leaf.info.nbytes))
            else:
                others.add(leaf.record)
    return {
        record
        for record, ranges in reads.items()
        if record.crc32 is not None and record not in others and _tile(sorted(ranges), record.range.length)
    }


def _tile(ranges: list[tuple[int, int]], length: int) -> bool:
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
    return [*starts, length] == [0, *ends]


def _segments(shard: Shard, placed: list[tuple[int, str, Expression]], start: int, end: int) -> Segments:
    """Return the segments of the bytes from ``start`` to ``end``; only tensors that can be copied are cut."""
    found: list[bytes | tuple[str, Expression]] = [shard.header] if start == 0 else []
    for at, name, tensor in placed:
        first, last = max(start, at), min(end, at + tensor.info.nbytes)
        if first < last and last - first == tensor.info.nbytes:
            found.append((name, tensor))
        elif first < last:
            assert isinstance(tensor, Read)
            found.append((name, _slice(tensor, first - at, last - first)))
    return found


def _slice(tensor: Read, start: int, length: int) -> Read:
    """Return some bytes of a contiguous tensor; ``start`` and ``length`` are in bytes."""
    size = tensor.info.itemsize
    flat = reshape(tensor, (tensor.info.nbytes // size,)).narrow(0, start // size, length // size)
    assert isinstance(flat, Read)
    return flat
