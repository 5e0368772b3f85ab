"""Refuses tensors that are slow to read because their values are far apart in the file.

A column of a matrix takes as long as the whole matrix, which is acceptable. A small hostile file could choose strides
so that a few megabytes are read thousands of times.
"""

from collections.abc import Mapping

from streamconv.errors import MappingError
from streamconv.tensors.concatenation import Concat
from streamconv.tensors.expressions import Expression
from streamconv.tensors.tiles import contiguous_read, cost, tiles

_MAX_TIMES = 64  # how often a tensor may be read
_MAX_BYTES = 1 << 30  # how much may be read in total for tensors that are read more often


def refuse_unstreamable(targets: Mapping[str, Expression]) -> None:
    """Refuse tensors that would be read too many times.

    Raises:
        MappingError: lists them.
    """
    counts = {name: estimate_bytes_read(tensor) for name, tensor in targets.items() if contiguous_read(tensor) is None}
    slow = {name: count for name, count in counts.items() if count > _MAX_TIMES * targets[name].info.nbytes}
    if sum(slow.values()) > _MAX_BYTES:
        problems = [f"{name}: {_reason(targets[name], count)}" for name, count in slow.items()]
        raise MappingError("Some tensors are laid out so that they cannot be streamed:", problems)


def estimate_bytes_read(tensor: Expression) -> int:
    """Estimate from its first tile how many bytes are read for a tensor, with gaps and what runs cost."""
    if contiguous_read(tensor) is not None or not tensor.info.nbytes:
        return tensor.info.nbytes
    if isinstance(tensor, Concat):
        return sum(map(estimate_bytes_read, tensor.parts))
    return int(cost(next(tiles(tensor))) * tensor.info.nbytes)


def _reason(tensor: Expression, count: int) -> str:
    leaf = next(tensor.leaves())
    return (
        f"{leaf.record.file.name}: the tensor {leaf.info} in {leaf.record.name} has strides {list(leaf.strides)}, so "
        f"reading its {tensor.info.nbytes:,} bytes takes as long as reading {count:,}. Save it again after "
        "tensor.contiguous()."
    )
