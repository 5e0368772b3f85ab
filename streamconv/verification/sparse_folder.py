"""A folder that transformers can load, with holes in place of the weights, for an output that was uploaded and deleted.

Its files have the output's headers and sizes, but occupy no disk space. Loading it shows that every
tensor is found, and at which file offset each of the model's parameters lies. That identifies the
parameter's source tensor, from which its values are read when the model runs.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv.formats.safetensors import INDEX_NAME
from streamconv.planning.plan import Plan
from streamconv.planning.shards import Shard
from streamconv.tensors.concatenation import reshape
from streamconv.tensors.expressions import Expression
from streamconv.tensors.shapes import TooManyPartsError


def write_sparse_folder(plan: Plan, folder: Path) -> None:
    """Write the plan's files into an existing folder, each shard as a header followed by a hole."""
    for shard in plan.shards:
        with open(folder / shard.filename, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    for name, data in {**plan.small_files, **({INDEX_NAME: plan.index} if plan.index is not None else {})}.items():
        (folder / name).write_bytes(data)


def source_tensors_of(model: Any, plan: Plan, folder: Path) -> Mapping[str, Expression] | None:
    """The source of each parameter of a model that was loaded from a sparse folder, in the model's order.

    None if the system does not report file mappings, or if transformers copied a tensor.
    """
    from streamconv.verification.page_cache import FileMappings  # imports torch, which writing the folder does not need

    mappings, found = FileMappings(), {}
    shards = {(folder / shard.filename).resolve(): _offsets(shard) for shard in plan.shards}
    for name, parameter in model.state_dict().items():
        path, offset = mappings.location_of(parameter) or (None, 0)
        offsets = shards.get(path) if path is not None else None
        tensor = next(
            (_part(t, offset - at, parameter.shape) for at, t in offsets or () if at <= offset < at + t.info.nbytes),
            None,
        )
        if tensor is None:
            return None
        found[name] = tensor
    return found


def _offsets(shard: Shard) -> list[tuple[int, Expression]]:
    """The tensors of a shard with their offsets in the file, in bytes."""
    offsets, at = [], len(shard.header)
    for _, tensor in shard.tensors:
        offsets.append((at, tensor))
        at += tensor.info.nbytes
    return offsets


def _part(tensor: Expression, offset: int, shape: tuple[int, ...]) -> Expression | None:
    """The tensor of this shape that begins ``offset`` bytes into ``tensor``'s bytes in the output, if there is one."""
    first, count = offset // tensor.info.itemsize, math.prod(shape)
    if offset == 0 and tensor.shape == tuple(shape):
        return tensor
    if first + count > math.prod(tensor.shape):
        return None
    try:
        return reshape(reshape(tensor, (math.prod(tensor.shape),)).narrow(0, first, count), tuple(shape))
    except TooManyPartsError:
        return None
