"""DINOv3 ViTs are recognised by name and shape; what transformers cannot express is refused by name."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streamconv import MappingError
from streamconv.cli.messages import plan_lines
from streamconv.families.dinov3 import FAMILY
from streamconv.families.dinov3_geometry import summarise
from streamconv.families.registry import find_model
from streamconv.families.selection import find_backbone
from streamconv.jobs.authors_layout import restore_originals
from streamconv.planning.make import make_plan
from streamconv.planning.plan import Plan
from tests.support import GOLDEN, checkpoint_of_shapes, expanded

NAMES = [model.name for model in FAMILY.models]
PREFIXES = ["", "teacher.backbone.", "module.", "model.student.backbone."]
Shapes = dict[str, tuple[int, ...]]


def small(**changes: tuple[int, ...] | None) -> Shapes:
    """Return the shapes of ViT-S with two layers, with other shapes for some keys; None removes a key in each layer."""
    shapes = {key: tuple(shape) for key, shape in GOLDEN["dinov3_vits16"]["source"].items()}
    for key, shape in changes.items():
        shapes.pop(key, None)
        shapes |= {key: shape} if shape is not None else {}
    return expanded({key: [*shape] for key, shape in shapes.items()}, 2)


def plan(shapes: Shapes, summaries: Mapping[str, Any] | None = None, filename: str = "x.pth", **options: Any) -> Plan:
    tensors = checkpoint_of_shapes(shapes, Path(filename))
    selection = find_backbone(tensors, filename)
    selected = selection.tensors(tensors, filename)
    return make_plan(selected, filename, selection=selection, summaries=summaries, filename=filename, **options)


def without_periods(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: summary for key, summary in found.items() if key != "rope_embed.periods"}


def summaries(mask: str, bias: str = "with keys", periods: str = "rounded") -> dict[str, str]:
    found = {"rope_embed.periods": periods}
    for i in range(2):
        found |= {f"blocks.{i}.attn.qkv.bias_mask": mask, f"blocks.{i}.attn.qkv.bias": bias}
    return found


# Recognition


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", [*NAMES, "dinov2_vits14", "dinov2_vitg14_reg", "webssl_dino300m_full2b_224"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_dinov2_and_dinov3_are_never_taken_for_each_other(name: str, side: str, prefix: str) -> None:
    golden = GOLDEN[name]
    names = expanded(golden[side], golden["layers"], golden.get("chunks", ()))
    found = find_backbone(checkpoint_of_shapes({prefix + key: shape for key, shape in names.items()}), "x.pth")
    assert (found.family.name, found.prefix) == (name[:6].replace("webssl", "dinov2"), prefix)
    assert found.is_converted == (side == "target")


def test_names_that_transformers_5_has_in_memory_are_recognised() -> None:
    golden = GOLDEN["dinov3_vits16plus"]
    shapes = expanded(golden["target"], golden["layers"])
    named = {f"model.{key}" if key.startswith("layer.") else key: shape for key, shape in shapes.items()}
    made = plan(named)
    assert made.model is not None
    assert made.model.name == "dinov3_vits16plus"
    assert {name: tensor.info.shape for shard in made.shards for name, tensor in shard.tensors} == shapes


@pytest.mark.parametrize("name", NAMES)
def test_model_is_recognised_in_the_names_of_transformers(name: str) -> None:
    """ViT-L of satellite images differs only by a norm in the authors' file, which the converted model lacks."""
    golden = GOLDEN[name]
    made = plan(expanded(golden["target"], golden["layers"]))
    expected = {"dinov3_vitl16_sat493m": "dinov3_vitl16"}.get(name, name if "7b" not in name else None)
    assert (made.model.name if made.model else None) == expected
    assert made.config["num_attention_heads"] == golden["heads"]


def test_published_files_are_known_by_their_addresses_and_the_start_of_their_sha256() -> None:
    files = {model.name: model.backbone for model in FAMILY.models}
    assert files["dinov3_vit7b16"].url == (
        "https://dl.fbaipublicfiles.com/dinov3/dinov3_vit7b16/dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth"
    )
    assert {name: file.sha256_start for name, file in files.items()} == {
        "dinov3_vits16": "08c60483", "dinov3_vits16plus": "4057cbaa", "dinov3_vitb16": "73cec8be",
        "dinov3_vitl16": "8aa4cbdd", "dinov3_vitl16_sat493m": "eadcf0ff", "dinov3_vitl16plus": "46503df0",
        "dinov3_vith16plus": "7c1da9a5", "dinov3_vit7b16": "a955f4ea", "dinov3_vit7b16_sat493m": "a6675841",
    }  # fmt: skip
    assert find_model("facebook/dinov3-vit7b16-pretrain-sat493m")[1].name == "dinov3_vit7b16_sat493m"


@pytest.mark.parametrize("name", ["dinov3_vitl16_sat493m", "dinov3_vit7b16_sat493m"])
def test_models_of_satellite_images_have_the_mean_that_their_authors_state(name: str) -> None:
    golden, model = GOLDEN[name], find_model(name)[1]
    made = plan(expanded(golden["source"], golden["layers"]), filename=model.backbone.filename)
    assert made.is_published
    assert made.image_processor is not None
    assert made.image_processor["image_mean"] == [0.430, 0.411, 0.296]
    assert made.image_processor["image_std"] == [0.213, 0.156, 0.143]
    assert any("satellite" in note for note in made.notes)


# Attention heads


def test_periods_show_the_number_of_heads() -> None:
    made = plan(small(**{"rope_embed.periods": (32,)}))
    assert made.config["num_attention_heads"] == 384 // (4 * 32)
    assert made.assumed_heads is None
    assert not any("attention heads" in note for note in (*made.notes, *made.unproved))


def test_other_number_of_heads_than_the_periods_show_is_refused() -> None:
    with pytest.raises(MappingError, match=r"rope_embed\.periods shows 64 channels in a head.*omit --num-heads"):
        plan(small(), num_heads=12)
    assert plan(small(), num_heads=6).config["num_attention_heads"] == 6


def test_number_of_heads_is_asked_for_if_neither_periods_nor_published_models_show_it() -> None:
    shapes = {key: tuple(96 if size == 384 else size for size in shape) for key, shape in _converted(2).items()}
    with pytest.raises(MappingError, match="give the number with --num-heads"):
        plan(shapes)
    assert plan(shapes, num_heads=3).config["num_attention_heads"] == 3
    with pytest.raises(MappingError, match="cannot be divided into 5 attention heads"):
        plan(shapes, num_heads=5)


def _converted(layers: int) -> Shapes:
    return expanded(GOLDEN["dinov3_vits16"]["target"], layers)


# Reverting


@pytest.mark.parametrize("name", NAMES)
def test_reverted_model_has_all_keys_of_the_file_that_the_manifest_names(name: str) -> None:
    """Only the manifest shows that ViT-L of satellite images had a norm for local crops."""
    golden = GOLDEN[name]
    converted = checkpoint_of_shapes(expanded(golden["target"], golden["layers"]))
    _, model, _, tensors = restore_originals(converted, "folder", {}, name)
    assert {key: tensor.info.shape for key, tensor in tensors.items()} == expanded(golden["source"], golden["layers"])
    assert model is not None
    assert model.dimensions == find_model(name)[1].dimensions
    assert "rope_embed.periods" in restore_originals(converted, "folder", {}, "dinov2_vits14")[3]


# Values that decide


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 1, 0, 0, 1, 1], "keys"), ([0] * 6, "zero"), ([1] * 6, "with keys"), ([1, 0, 0, 0, 1, 1], "without keys"),
     ([0.5, 0.5, 0, 0, 0.5, 0.5], "without keys"), ([1, 1, 0, math.nan, 1, 1], "nan"), ([math.inf] * 6, "nan"),
     ([0, 0, 1, 1, 0, 0], "with keys")],
)  # fmt: skip
def test_mask_is_summarised(values: list[float], expected: str) -> None:
    assert summarise("blocks.0.attn.qkv.bias_mask", values) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [(lambda i, value: value, "exact"), (lambda i, value: value * (1 + 2.0**-9), "rounded"),
     (lambda i, value: 1000 ** (i / 16), "others"), (lambda i, value: 90 ** (i / 16), "others"),
     (lambda i, value: 0.5 * 180 ** (i / 15), "others"), (lambda i, value: math.nan if i else value, "others"),
     (lambda i, value: 0.0, "others")],
)  # fmt: skip
def test_periods_are_compared_with_those_of_transformers(change: Any, expected: str) -> None:
    assert summarise("rope_embed.periods", [change(i, 100 ** (i / 16)) for i in range(16)]) == expected


@pytest.mark.parametrize(
    ("mask", "bias", "biases", "has_keys"),
    [("keys", "with keys", "copied", False), ("zero", "zero", "copied", False), ("zero", "with keys", "filled", False),
     ("with keys", "with keys", "multiplied", True), ("without keys", "with keys", "multiplied", False),
     ("without keys", "zero", "copied", False)],
)  # fmt: skip
def test_mask_decides_what_becomes_of_the_biases(mask: str, bias: str, biases: str, has_keys: bool) -> None:
    made = plan(small(), summaries(mask, bias))
    moved = {each.source: each.targets for each in made.mapping}
    names = [f"layer.1.attention.{letter}_proj.bias" for letter in ("qkv" if has_keys else "qv")]
    is_moved = {"blocks.1.attn.qkv.bias": biases != "filled", "blocks.1.attn.qkv.bias_mask": biases == "multiplied"}
    for source, is_expected in is_moved.items():
        assert moved.get(source, ()) == (tuple(names) if is_expected else ())
    assert {*names} <= {name for shard in made.shards for name, _ in shard.tensors}
    assert (names[0] in made.filled) == (biases == "filled")
    assert made.config["key_bias"] == has_keys
    assert made.config["query_bias"] is made.config["value_bias"] is True


def test_bias_of_keys_without_a_mask_is_kept() -> None:
    made = plan(small(**{"blocks.{i}.attn.qkv.bias_mask": None}), {"rope_embed.periods": "exact"})
    assert made.config["key_bias"] is True
    assert "layer.0.attention.k_proj.bias" in {name for shard in made.shards for name, _ in shard.tensors}


def test_biases_of_keys_are_kept_if_a_file_has_neither_masks_nor_periods() -> None:
    """Its code saved parameters only, and nothing shows that the biases are removed."""
    shapes = small(**{"rope_embed.periods": None, "blocks.{i}.attn.qkv.bias_mask": None})
    for bias in ("with keys", "without keys"):
        made = plan(shapes, {f"blocks.{i}.attn.qkv.bias": bias for i in range(2)})
        assert made.config["key_bias"] == (bias == "with keys")


def test_target_that_is_made_of_several_sources_is_counted_once() -> None:
    made = plan(small(), summaries("mixed"))
    written = sum(len(shard.tensors) for shard in made.shards)
    assert f" become {written}; --mapping shows how." in list(map(str, plan_lines(made)))[-1]


def test_masks_of_all_blocks_are_required() -> None:
    shapes = small()
    del shapes["blocks.1.attn.qkv.bias_mask"]
    found = summaries("keys")
    del found["blocks.1.attn.qkv.bias_mask"]
    with pytest.raises(MappingError, match=r"bias_mask is missing in some blocks"):
        plan(shapes, found)


# Variants that transformers cannot express


@pytest.mark.parametrize(
    ("shapes", "found", "message"),
    [(small(**{"cls_norm.weight": (384,), "cls_norm.bias": (384,)}), None, "cls_norm, untie_cls_and_patch_norms"),
     (small(**{"norm.bias": None, "blocks.{i}.norm1.bias": None, "blocks.{i}.norm2.bias": None}), None, "RMSNorm"),
     (small(), summaries("keys", periods="others"), r"rope_embed\.periods are not 100 \*\* \(i / n\)"),
     (small(), summaries("nan"), r"bias_mask holds NaN"),
     (small(), summaries("keys", "nan"), r"qkv\.bias or its bias_mask holds NaN"),
     (small(), {"rope_embed.periods": "rounded"}, r"bias_mask .* does not hold floating-point numbers"),
     (small(), without_periods(summaries("keys")), r"periods .* are not floating-point numbers")],
)  # fmt: skip
def test_variant_is_refused_by_name_as_the_only_problem(shapes: Shapes, found: Any, message: str) -> None:
    with pytest.raises(MappingError, match=message) as caught:
        plan(shapes, found)
    assert len(caught.value.problems) == 1


def test_variant_is_refused_even_if_the_backbone_was_selected() -> None:
    named = {f"m.{key}": shape for key, shape in small(**{"cls_norm.weight": (384,)}).items()}
    selection = find_backbone(checkpoint_of_shapes(named), "x.pth", "m")
    assert "cls_norm.weight" in selection.names


# Assumptions


@pytest.mark.parametrize(
    ("changes", "epsilon"),
    [({}, 1e-5), ({"storage_tokens": None}, 1e-5), ({"blocks.{i}.attn.qkv.bias_mask": None}, 1e-5),
     ({"storage_tokens": None, "blocks.{i}.attn.qkv.bias_mask": None}, 1e-6)],
)  # fmt: skip
def test_epsilon_is_that_of_the_authors_configurations_and_is_called_assumed(changes: Any, epsilon: float) -> None:
    """Without storage tokens and masks, it is their default configuration, which has another epsilon."""
    made = plan(small(**changes))
    assert made.config["layer_norm_eps"] == epsilon
    (assumption,) = made.unproved
    assert assumption.startswith(f"the layer norms' epsilon is assumed to be {epsilon:g}, and coordinates of patches")
    assert assumption in made.notes


def test_assumptions_are_noted_for_the_shapes_of_a_published_file_but_not_for_its_name() -> None:
    golden, model = GOLDEN["dinov3_vitb16"], find_model("dinov3_vitb16")[1]
    shapes = expanded(golden["source"], golden["layers"])
    named, renamed = (plan(shapes, filename=name) for name in (model.backbone.filename, "mine.pth"))
    assert not any("assumed" in note for note in named.notes)
    assert sum("epsilon is assumed" in note for note in renamed.notes) == 1
    assert named.unproved == renamed.unproved == ()


def test_model_of_equal_shapes_with_another_image_processor_is_noted() -> None:
    golden = GOLDEN["dinov3_vit7b16"]
    made = plan(expanded(golden["source"], golden["layers"]), filename="mine.pth")
    assert any("dinov3_vit7b16_sat493m of the same shapes has another" in note for note in made.notes)


def test_dinov2_checkpoint_with_a_tensor_of_dinov3_is_refused() -> None:
    golden = GOLDEN["dinov2_vits14"]
    shapes = expanded(golden["source"], 12) | {"rope_embed.periods": (16,)}
    with pytest.raises(MappingError, match=r"rope_embed\.periods"):
        plan(shapes)
