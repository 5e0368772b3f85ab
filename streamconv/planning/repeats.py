"""Detects outputs that are much larger than their source: tensors with stride 0 and overlapping views repeat data.

A tied or expanded tensor adds little, but a .pth of 20 kB can describe gigabytes.
"""

from collections.abc import Iterable
from itertools import chain

from streamconv.errors import RepeatedDataError
from streamconv.files.base import FileRef
from streamconv.planning.shards import Shard
from streamconv.tensors.expressions import Expression

# The user is asked if more than `_MAX_TIMES` the bytes that are read, and `_MAX_BYTES` more, would be written.
_MAX_TIMES, _MAX_BYTES = 2, 100_000_000


def distinct_bytes(tensors: Iterable[Expression]) -> int:
    """Return how many bytes of their files the tensors cover, each counted once, with the gaps of strided tensors."""
    ranges: dict[FileRef, list[tuple[int, int]]] = {}
    for leaf in chain.from_iterable(tensor.leaves() for tensor in tensors):
        ranges.setdefault(leaf.record.file, []).append((leaf.range.start, leaf.range.end))
    count = 0
    for each in ranges.values():
        end = 0
        for start, stop in sorted(each):
            count += max(0, stop - max(start, end))
            end = max(end, stop)
    return count


def repeats_note(shards: Iterable[Shard]) -> str:
    """Return a note about an output that is much larger than its source, before casts; "" otherwise."""
    tensors = [tensor for shard in shards for _, tensor in shard.tensors]
    written, read = sum(leaf.info.nbytes for tensor in tensors for leaf in tensor.leaves()), distinct_bytes(tensors)
    if written <= _MAX_TIMES * read + _MAX_BYTES:
        return ""
    return f"the source repeats its data: {read:,} bytes of it become {written:,} bytes of weights"


def refuse_repeats(shards: Iterable[Shard], *, is_allowed: bool) -> None:
    """Refuse an output that is much larger than its source, unless the user allowed it.

    Raises:
        RepeatedDataError: names both sizes.
    """
    note = repeats_note(shards)
    if note and not is_allowed:
        raise RepeatedDataError(
            f"{note[0].upper()}{note[1:]}",
            "If that is what you expect, add --yes (ConversionOptions.allow_repeats in Python).",
        )
