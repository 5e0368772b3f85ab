"""Finds outputs that are much larger than what they are made from: views with stride 0, or that overlap, repeat data.

A tied or expanded tensor adds little. But 20 kB of a .pth can describe gigabytes.
"""

from collections.abc import Iterable

from streamconv.errors import RepeatedDataError
from streamconv.files.base import FileRef
from streamconv.planning.shards import Shard
from streamconv.tensors.expressions import SourceTensor

_MIN_BYTES, _MIN_TIMES = 100_000_000, 2  # that are written more than are read, before the user is asked


def distinct_bytes(tensors: Iterable[SourceTensor]) -> int:
    """Return how many bytes of their files the tensors consist of, each counted once; gaps in strided ones count."""
    ranges: dict[FileRef, list[tuple[int, int]]] = {}
    for tensor in tensors:
        ranges.setdefault(tensor.record.file, []).append((tensor.read_range.start, tensor.read_range.end))
    count = 0
    for each in ranges.values():
        end = 0
        for start, stop in sorted(each):
            count += max(0, stop - max(start, end))
            end = max(end, stop)
    return count


def repeats_note(shards: Iterable[Shard]) -> str:
    """Return a remark on an output that is much larger than what it is made from; "" otherwise. Casts do not count."""
    tensors = [tensor for shard in shards for _, tensor in shard.tensors]
    written, read = sum(tensor.info.nbytes for tensor in tensors), distinct_bytes(tensors)
    if written <= _MIN_TIMES * read + _MIN_BYTES:
        return ""
    return f"the source repeats its data: {read:,} bytes of it become {written:,} bytes of weights"


def refuse_repeats(shards: Iterable[Shard], *, is_allowed: bool) -> None:
    """Refuse an output that is much larger than what it is made from, unless the user allowed it.

    Raises:
        RepeatedDataError
    """
    note = repeats_note(shards)
    if note and not is_allowed:
        raise RepeatedDataError(
            f"{note[0].upper()}{note[1:]}. If that is what you expect, add --yes "
            "(ConversionOptions.allow_repeats in Python)."
        )
