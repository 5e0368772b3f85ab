"""timm's layouts of DINOv2 and its config.json: the facts in them, and those that remain unknown."""

import json
from pathlib import Path
from typing import Any

import pytest

from streamconv import MappingError
from streamconv.families.dinov2_geometry import Dimensions, ffn_size
from streamconv.families.dinov2_timm import heads_beside, image_processor_beside
from streamconv.families.image_processors import PixelSteps, read_pixel_steps
from tests.support import GOLDEN, ROOT, expanded, plan_of_shapes

GIANT = Dimensions(1536, 40, ffn_size(1536, 4, True), swiglu=True)
HUGE = Dimensions(1280, 32, ffn_size(1280, 4, True), swiglu=True)
# As in the configurations that were published for these models.
H_OPTIMUS: dict[str, Any] = {
    "architecture": "vit_giant_patch14_reg4_dinov2",
    "num_features": 1536,
    "global_pool": "token",
    "pretrained_cfg": {
        "input_size": [3, 224, 224], "fixed_input_size": True, "mean": [0.707223, 0.578729, 0.703617],
        "std": [0.211883, 0.230117, 0.177517],
    },
}  # fmt: skip
VIRCHOW_2: dict[str, Any] = {
    "architecture": "vit_huge_patch14_224",
    "model_args": {"img_size": 224, "reg_tokens": 4, "mlp_ratio": 5.3375, "global_pool": "", "dynamic_img_size": True},
    "pretrained_cfg": {
        "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "sizes", "heads"),
    [
        (H_OPTIMUS, GIANT, 24),
        (VIRCHOW_2, HUGE, 16),
        (VIRCHOW_2, GIANT, None),
        ({**VIRCHOW_2, "model_args": {"depth": 40}}, HUGE, None),
        ({**VIRCHOW_2, "model_args": {"num_heads": 20}}, HUGE, 20),
        ({"architecture": "vit_giant_patch14_224", "model_args": {"embed_dim": 1536, "num_heads": 24}}, GIANT, 24),
        ({"architecture": "resnet50"}, HUGE, None),
        ({"architecture": ["vit_huge_patch14_224"]}, HUGE, None),
    ],
)
def test_heads_are_those_of_an_architecture_of_this_size(
    config: dict[str, Any], sizes: Dimensions, heads: int | None
) -> None:
    assert heads_beside(config, sizes) == heads


def steps(config: dict[str, Any], sizes: Dimensions = GIANT, **changes: object) -> PixelSteps | None:
    config = {**config, "pretrained_cfg": {**config["pretrained_cfg"], **changes}}
    found = image_processor_beside(config, sizes)
    return found and read_pixel_steps(found)


def test_image_processor_has_the_steps_of_timms_evaluation() -> None:
    """timm resizes to floor(size / crop_pct), where crop_pct is 0.875 if it is not given."""
    mean, std = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
    assert steps(H_OPTIMUS) == PixelSteps(256, (224, 224), mean, std)
    assert steps(H_OPTIMUS, crop_pct=0.95, interpolation="bilinear") == PixelSteps(235, (224, 224), mean, std, 2)
    assert steps(H_OPTIMUS, crop_pct=1.0, input_size=[3, 518, 518]) == PixelSteps(518, (518, 518), mean, std)
    nothing = dict.fromkeys(("crop_pct", "interpolation", "crop_mode", "input_size"))
    assert steps(H_OPTIMUS, **nothing) == PixelSteps(256, (224, 224), mean, std)
    assert steps(VIRCHOW_2, HUGE) == PixelSteps(224, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": None}, {"mean": [0.5]}, {"std": [0.5, 0.5, 0.0]}, {"std": [0.5, 0.5, "0.5"]}, {"mean": [1e9] * 3},
        {"crop_mode": "border"}, {"interpolation": "random"}, {"interpolation": ["bicubic"]}, {"crop_pct": 1e-9},
        {"crop_pct": "1"}, {"crop_pct": 1.2}, {"crop_pct": float("nan")}, {"input_size": [3, 224, 448]},
        {"input_size": [3, -224, -224]}, {"input_size": [3, 10**9, 10**9]}, {"input_size": 224},
        {"input_size": [3, 10**400, 10**400]}, {"std": [0.2, -0.2, 0.2]},
    ],
    ids=str,
)  # fmt: skip
def test_image_processor_with_unknown_steps_is_not_used(changes: dict[str, object]) -> None:
    assert steps(H_OPTIMUS, **changes) is None


def test_image_processor_of_another_model_is_not_used() -> None:
    assert image_processor_beside(H_OPTIMUS, HUGE) is None
    assert image_processor_beside({"pretrained_cfg": H_OPTIMUS["pretrained_cfg"]}, GIANT) is None
    assert image_processor_beside({**H_OPTIMUS, "pretrained_cfg": [1]}, GIANT) is None
    assert image_processor_beside({}, GIANT) is None


TIMM = [*json.loads((ROOT / "tests" / "golden" / "timm.json").read_text())]


@pytest.mark.parametrize("name", TIMM)
def test_every_model_maps_timms_keys_to_transformers_keys(name: str, tmp_path: Path) -> None:
    """The keys and shapes are those of timm 1.0.31's modules, and of the files that transformers' classes save."""
    golden = GOLDEN[name]
    source, target = (expanded(golden[side], golden["layers"]) for side in ("source", "target"))
    plan = plan_of_shapes(source, tmp_path, "model.safetensors", num_heads=golden["heads"])
    assert {name: tensor.info.shape for shard in plan.shards for name, tensor in shard.tensors} == target
    assert {move.source: move.info.shape for move in plan.mapping} == source
    assert plan.config["image_size"] == (518 if name.startswith("vit") else 224)
    # DINOv2's published models of the other widths have the same SwiGLU.
    assert any("SwiGLUPacked" in each for each in plan.unproved) is (name in ("virchow2", "h0_mini"))


@pytest.mark.parametrize("name", TIMM)
def test_heads_of_other_widths_than_published_ones_are_asked_for(name: str, tmp_path: Path) -> None:
    golden = GOLDEN[name]
    shapes = expanded(golden["source"], golden["layers"])
    if name == "virchow2":
        with pytest.raises(MappingError, match=r"models of hidden size 1280 do not agree on one .*: give"):
            plan_of_shapes(shapes, tmp_path)
    else:
        assert plan_of_shapes(shapes, tmp_path).config["num_attention_heads"] == golden["heads"]
