"""A folder as transformers loads it, with holes where the weights are: for an output that is sent elsewhere.

Its files have the output's own headers and sizes, and take no room. Loading it shows whether every
tensor is found, and where each of the loaded model's parameters lies in the files, so that its weights
can be read from the source when they are computed with.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamconv.formats.safetensors import INDEX_NAME
from streamconv.planning.plan import Plan
from streamconv.planning.shards import Shard
from streamconv.tensors.expressions import SourceTensor
from streamconv.tensors.info import TensorInfo, contiguous_strides
from streamconv.verification.page_cache import FileMappings


def write_sparse_folder(plan: Plan, folder: Path) -> None:
    for shard in plan.shards:
        with open(folder / shard.filename, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    for name, data in {**plan.small_files, **({INDEX_NAME: plan.index} if plan.index is not None else {})}.items():
        (folder / name).write_bytes(data)


def source_tensors_of(model: Any, plan: Plan, folder: Path) -> Mapping[str, SourceTensor] | None:
    """The source of each parameter of a model that was loaded from an outline, in the model's order.

    None where the system does not tell what is mapped from where, or transformers copied something.
    """
    mappings, found = FileMappings(), {}
    shards = {(folder / shard.filename).resolve(): _places(shard) for shard in plan.shards}
    for name, parameter in model.state_dict().items():
        path, offset = mappings.place_of(parameter) or (None, 0)
        places = shards.get(path) if path is not None else None
        tensor = next(
            (_part(t, offset - at, parameter.shape) for at, t in places or () if at <= offset < at + t.target.nbytes),
            None,
        )
        if tensor is None:
            return None
        found[name] = tensor
    return found


def _places(shard: Shard) -> list[tuple[int, SourceTensor]]:
    places, at = [], len(shard.header)
    for _, tensor in shard.tensors:
        places.append((at, tensor))
        at += tensor.target.nbytes
    return places


def _part(tensor: SourceTensor, offset: int, shape: tuple[int, ...]) -> SourceTensor | None:
    """The tensor that begins ``offset`` bytes into another one's row-major bytes, as they are written."""
    info = TensorInfo(tensor.info.dtype, tuple(shape))
    if offset == 0 and info == tensor.info:
        return tensor
    first = offset // tensor.target.itemsize
    if not tensor.is_contiguous or first * info.itemsize + info.nbytes > tensor.info.nbytes:
        return None
    return replace(
        tensor, info=info, offset=tensor.offset + first * info.itemsize, strides=contiguous_strides(info.shape)
    )
