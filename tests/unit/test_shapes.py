"""Tensors of impossible shapes are listed as problems, whichever tensors of a model have them."""

from pathlib import Path

import pytest

from streamconv import Checkpoint, Plan
from streamconv.errors import MappingError
from streamconv.families.dinov2 import FAMILY
from streamconv.families.selection import find_backbone
from streamconv.planning.make import make_plan
from tests.support import checkpoint_of_shapes, plan_of_shapes, tiny

DIMENSIONS = tiny(layers=1, hidden=64, classes=3)


@pytest.mark.parametrize("shape", [(), (0,), (0, 0, 0), (1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("part", ["query", "norm", "cls_token", "position", "projection", "mlp", "classifier", ""])
def test_converted_model_of_impossible_shapes_is_refused(part: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    shapes = {key: info.shape for key, info in FAMILY.sources(DIMENSIONS).items()}
    shards = plan_of_shapes(shapes, tmp_path).shards
    changed = {
        name: shape if part in name or (part == "query" and "attention.attention" in name) else tensor.info.shape
        for shard in shards
        for name, tensor in shard.tensors
    }
    with pytest.raises(MappingError):
        plan_of(checkpoint_of_shapes(changed))


@pytest.mark.parametrize("key", ["cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"])
def test_one_tensor_of_another_hidden_size_is_one_problem(key: str, tmp_path: Path) -> None:
    shapes = {key: info.shape for key, info in FAMILY.sources(tiny(hidden=64)).items()}
    shape = tuple(128 if size == 64 else size for size in shapes[key])
    with pytest.raises(MappingError) as caught:
        plan_of_shapes({**shapes, key: shape}, tmp_path)
    assert list(caught.value.problems) == [f"wrong shape: {key} is {list(shape)}, not {list(shapes[key])}"]


def plan_of(checkpoint: Checkpoint) -> Plan:
    selection = find_backbone(checkpoint, "x")
    tensors = selection.tensors(checkpoint, "x")
    return make_plan(tensors, "x", selection=selection)
