"""Recognises files whose weights are not whole, plain tensors."""

import re

from streamconv.errors import MappingError
from streamconv.formats.checkpoint import Checkpoint
from streamconv.formats.non_tensors import Kind, non_tensor_error
from streamconv.tensors.info import DTYPES

# torch.optim's state, by numbers of parameters: "optimizer.state.12.exp_avg".
OPTIMIZER_STATE = re.compile(r"(?:^|\.)state\.(?=\d+\.)")


def other_contents_error(checkpoint: Checkpoint, where: str) -> MappingError | None:
    """Return the error for a file whose weights are not plain tensors: most of them, or all."""
    others = {
        name: each
        for name, each in checkpoint.non_tensors.items()
        if each.kind is not Kind.VALUE and not OPTIMIZER_STATE.search(name)
    }
    weights = [
        name
        for name, tensor in checkpoint.items()
        if DTYPES[tensor.info.dtype].is_weight and tensor.info.shape and not OPTIMIZER_STATE.search(name)
    ]
    tensors = {name: each for name, each in others.items() if each.kind.is_tensor}
    if len(tensors) > len(weights):
        return non_tensor_error(tensors, where)
    if checkpoint:  # any checkpoint has objects beside its tensors
        others = {name: each for name, each in others.items() if each.kind is not Kind.OBJECT}
    return non_tensor_error(others, where) if others and not weights else None
