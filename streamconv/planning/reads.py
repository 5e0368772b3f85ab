"""Refuses tensors whose strides make them slow to read: a piece of a target is read with the gaps between its elements.

Reading a piece of a transposed matrix reads most of the matrix, so one of 16 MB, the largest that is streamed, is read
up to 64 times. A column is read with its whole matrix, but takes little. A hostile file could choose strides so that a
few megabytes are read thousands of times.
"""

from collections.abc import Mapping

from streamconv.errors import MappingError, SourceError
from streamconv.planning.shards import PIECE_BYTES
from streamconv.tensors.expressions import SourceTensor

_MAX_TIMES = 64  # how often a tensor may be read
_MAX_BYTES = 1 << 30  # may be read in total for tensors that are read more often


def refuse_unstreamable(targets: Mapping[str, SourceTensor]) -> None:
    """Refuse tensors that cannot be read in pieces, or that would be read too many times.

    Raises:
        MappingError: lists them.
    """
    problems: list[str] = []
    slow: dict[str, int] = {}
    for name, tensor in targets.items():
        if tensor.is_contiguous:
            continue
        try:
            next(tensor.split(PIECE_BYTES))
        except SourceError as error:
            problems.append(f"{name}: {error}")
            continue
        count = tensor.bytes_read(PIECE_BYTES)
        if count > _MAX_TIMES * max(tensor.info.nbytes, tensor.target.nbytes):
            slow[name] = count
    if sum(slow.values()) > _MAX_BYTES:
        problems += [f"{name}: {_reason(targets[name], count)}" for name, count in slow.items()]
    if problems:
        raise MappingError("Some tensors are laid out so that they cannot be streamed:", problems)


def _reason(tensor: SourceTensor, count: int) -> str:
    return (
        f"{tensor.record.file.name}: the tensor {tensor.info} in {tensor.record.name} has strides "
        f"{list(tensor.strides)}, so that {count:,} bytes would be read for its {tensor.info.nbytes:,}. Save it again "
        "after tensor.contiguous()."
    )
