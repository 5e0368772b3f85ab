"""Conversions of tiny DINOv3 ViTs, compared with what transformers and torch make of the same tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import streamconv
from streamconv import MappingError
from streamconv.families.dinov3 import FAMILY
from streamconv.families.dinov3_geometry import Dimensions
from streamconv.families.dinov3_rules import periods
from streamconv.files.inline import is_inline
from streamconv.source.open import open_source
from streamconv.source.resolve import resolve_source
from streamconv.tensors.evaluation import read_bytes
from tests import api
from tests.checkpoints import State, prefixed, saved
from tests.support import GOLDEN, expanded, plan_of_shapes

SIZES = Dimensions(hidden=128, layers=2, ffn=512)
VARIANTS = {
    "mlp": SIZES,
    "gated, as ViT-7B": Dimensions(128, 2, 88, is_gated=True, has_bias=False, mask="", has_local_norm=True),
    "gated with biases": Dimensions(128, 2, 88, is_gated=True),
    "biases of keys": Dimensions(128, 2, 512, has_key_bias=True, mask=""),
    "without registers": Dimensions(128, 2, 512, registers=0),
    "without biases of linear layers": Dimensions(128, 2, 88, is_gated=True, has_ffn_bias=False, has_proj_bias=False),
    "without LayerScale": Dimensions(128, 2, 512, has_layer_scale=False),
}  # fmt: skip
KEYS_REMOVED = torch.cat([torch.ones(128), torch.zeros(128), torch.ones(128)])


def make_state(sizes: Dimensions = SIZES) -> State:
    """Return random tensors with the authors' keys. Periods are rounded to bfloat16 as in the published files."""
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(info.shape, generator=generator) * 0.1 for key, info in FAMILY.sources(sizes).items()}
    masks = {key: KEYS_REMOVED.clone() for key in state if key.endswith("bias_mask")}
    return state | masks | {"rope_embed.periods": (100 ** (torch.arange(16) / 16)).bfloat16()}


def mapped(state: State) -> State:
    """Map the authors' keys to those in transformers' files, independently of the rules."""
    result: State = {}
    for key, value in state.items():
        if key.startswith(("rope_embed", "local_cls_norm")) or key.endswith("bias_mask"):
            continue
        new = key.replace("blocks.", "layer.").replace("patch_embed.proj", "embeddings.patch_embeddings")
        new = new.replace("attn.proj", "attention.o_proj").replace("ls1.gamma", "layer_scale1.lambda1")
        new = new.replace("ls2.gamma", "layer_scale2.lambda1").replace("mlp.w1", "mlp.gate_proj")
        new = new.replace("mlp.w2", "mlp.up_proj").replace("mlp.w3", "mlp.down_proj")
        new = new.replace("mlp.fc1", "mlp.up_proj").replace("mlp.fc2", "mlp.down_proj")
        if key in ("cls_token", "mask_token", "storage_tokens"):
            result[f"embeddings.{key.replace('storage', 'register')}"] = value.reshape(1, -1, value.shape[-1])
        elif "attn.qkv" in key:
            mask = state.get(f"{key}_mask")
            product = value if mask is None else value * mask
            for letter, part in zip("qkv", product.chunk(3), strict=True):
                if mask is None or letter != "k" or mask.chunk(3)[1].any():
                    result[new.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            result[new] = value
    return result


def theirs(state: State, config: Any, folder: Path) -> dict[str, bytes]:
    """Return the files that transformers writes for a model with these tensors; others keep their initial values."""
    model = transformers.DINOv3ViTModel.from_pretrained(
        None, config=transformers.DINOv3ViTConfig(**config), state_dict=mapped(state)
    )
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_bytes())
    del config["transformers_version"]
    (folder / "config.json").write_text(json.dumps(config))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", VARIANTS)
def test_folder_equals_what_save_pretrained_writes(name: str, tmp_path: Path) -> None:
    state = make_state(VARIANTS[name])
    done = api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "out")
    expected = theirs(state, done.plan.config, tmp_path / "theirs")
    assert (done.output / "model.safetensors").read_bytes() == expected["model.safetensors"]
    assert json.loads((done.output / "config.json").read_bytes()) == json.loads(expected["config.json"])


@pytest.mark.parametrize("name", ["zero", "mixed", "mixed for queries and values", "release"])
def test_biases_are_multiplied_by_their_masks(name: str, tmp_path: Path) -> None:
    state = make_state()
    for key in [key for key in state if key.endswith("bias_mask")]:
        if name in ("zero", "release"):
            state[key] = torch.zeros(384)
        else:
            state[key] = torch.rand(384).round(decimals=1) * (1 if name == "mixed" else KEYS_REMOVED)
        if name == "release":
            state[key.removesuffix("_mask")] = torch.zeros(384)
    folder = api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "out").output
    found, expected = safetensors.torch.load_file(folder / "model.safetensors"), mapped(state)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    has_keys = name == "mixed"
    assert ("layer.1.attention.k_proj.bias" in found) == has_keys
    assert json.loads((folder / "config.json").read_bytes())["key_bias"] == has_keys


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda state: state["blocks.1.attn.qkv.bias_mask"].__setitem__(7, torch.nan), "bias_mask holds NaN"),
     (lambda state: state["rope_embed.periods"].__setitem__(15, 90.0), r"not 100 \*\* \(i / n\)"),
     (lambda state: state.update({"blocks.0.attn.qkv.bias_mask": KEYS_REMOVED.bool()}), "floating-point")],
)  # fmt: skip
def test_values_that_transformers_cannot_express_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    state = make_state()
    change(state)
    with pytest.raises(MappingError, match=message):
        api.plan(saved(state, tmp_path / "x.pth"))


@pytest.mark.parametrize("name", [model.name for model in FAMILY.models])
def test_configs_equal_those_of_transformers_except_for_the_version(name: str, tmp_path: Path) -> None:
    """The sizes are those in transformers' conversion script; "l16plus" is not in it."""
    size = name.removeprefix("dinov3_vit").removesuffix("_sat493m")
    gated = {"use_gated_mlp": True, "hidden_act": "silu"}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    sizes: dict[str, Any] = {
        "s16": {},
        "s16plus": gated,
        "b16": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "l16": large,
        "l16plus": {**large, **gated},
        "h16plus": {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, **gated,
        },
        "7b16": {
            "hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 40, "num_attention_heads": 32,
            "query_bias": False, "value_bias": False, **gated,
        },
    }[size]  # fmt: skip
    config = transformers.DINOv3ViTConfig(num_register_tokens=4, **sizes)
    config.architectures, config.dtype = ["DINOv3ViTModel"], torch.float32
    config.save_pretrained(tmp_path)
    lines = (tmp_path / "config.json").read_text("utf-8").splitlines(keepends=True)
    golden = GOLDEN[name]
    plan = plan_of_shapes(expanded(golden["source"], golden["layers"]), tmp_path)
    expected = "".join(line for line in lines if '"transformers_version"' not in line)
    assert plan.small_files["config.json"].decode() == expected


def test_dropped_tensors_may_have_another_dtype(tmp_path: Path) -> None:
    state = {key: value.to(torch.float16) for key, value in make_state().items()}
    state["rope_embed.periods"] = state["rope_embed.periods"].float()
    state |= {key: KEYS_REMOVED.bfloat16() for key in state if key.endswith("bias_mask")}
    assert api.plan(saved(state, tmp_path / "x.pth")).config["dtype"] == "float16"


# Reverting


@pytest.mark.parametrize("name", VARIANTS)
def test_reverted_file_has_the_authors_keys_and_their_initial_values(name: str, tmp_path: Path) -> None:
    sizes = VARIANTS[name]
    state = make_state(sizes)
    folder = api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "out").output
    done = streamconv.revert(folder, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    # Nothing in a converted model of this size shows that there was a norm for local crops.
    kept = {key: value for key, value in state.items() if not key.startswith("local_cls_norm")}
    assert list(back) == list(kept)
    for key, value in kept.items():
        expected = value * KEYS_REMOVED if key.endswith("qkv.bias") and sizes.mask else value
        assert (back[key].dtype, back[key].shape) == (expected.dtype, expected.shape), key
        assert torch.equal(back[key], expected), key
    assert any("rope_embed.periods" in line for line in done.restored)
    assert any("bias_mask" in line for line in done.restored) == bool(sizes.mask)


def test_folder_of_transformers_without_registers_is_converted_and_reverted(tmp_path: Path) -> None:
    state = make_state(VARIANTS["without registers"])
    folder = api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "out").output
    (folder / "streamconv.json").unlink()
    again = api.convert(folder, tmp_path / "again").output
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    streamconv.revert(folder, tmp_path / "back.pth")
    assert list(torch.load(tmp_path / "back.pth", weights_only=True)) == list(state)


def test_constants_do_not_make_a_source_remote(tmp_path: Path) -> None:
    folder = api.convert(saved(make_state(), tmp_path / "x.pth"), tmp_path / "out").output
    with open_source(resolve_source(folder)) as source:
        bias = source.tensors["blocks.0.attn.qkv.bias"]
        assert any(is_inline(leaf.record.file) for leaf in bias.leaves())  # zeros for the keys
        assert not source.is_remote


def test_zeros_in_place_of_masked_biases_are_reverted(tmp_path: Path) -> None:
    state = make_state() | {f"blocks.{i}.attn.qkv.bias_mask": torch.zeros(384) for i in range(2)}
    folder = api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "out").output
    streamconv.revert(folder, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(state)
    assert not back["blocks.1.attn.qkv.bias"].any()


def test_periods_of_all_published_models_are_rounded_as_torch_rounds_them() -> None:
    for model in FAMILY.models:
        count = model.dimensions.head_size // 4
        restored = periods(model.dimensions)
        assert restored is not None
        expected = (100.0 ** (2 * torch.arange(count, dtype=torch.bfloat16) / (2 * count))).view(torch.uint8)
        assert read_bytes(restored) == expected.numpy().tobytes()


# Files


@pytest.mark.parametrize("key", ["teacher", "model"])
def test_teacher_of_a_training_checkpoint_is_converted(key: str, tmp_path: Path) -> None:
    state = make_state()
    heads = {"dino_head.last_layer.weight": torch.ones(4, 8), "ibot_head.mlp.0.bias": torch.ones(8)}
    saved({key: {**prefixed(state, "backbone."), **heads}}, tmp_path / "x.pth")
    folder = api.convert(tmp_path / "x.pth", tmp_path / "out").output
    alone = api.convert(saved(state, tmp_path / "y.pth"), tmp_path / "alone").output
    assert (folder / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_teacher_is_suggested_among_several_backbones_of_training(tmp_path: Path) -> None:
    roles = ("student", "teacher", "gram_teacher")
    saved({role: prefixed(make_state(), "backbone.") for role in roles}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"usually teacher\.backbone") as caught:
        api.plan(tmp_path / "x.pth")
    assert len(caught.value.problems) == 3
    plan = api.plan(tmp_path / "x.pth", select="gram_teacher.backbone")
    assert plan.mapping[0].source == "gram_teacher.backbone.cls_token"


def test_converted_model_is_converted_again_to_the_same_file(tmp_path: Path) -> None:
    for name in ("mlp", "gated with biases", "biases of keys"):
        folder = tmp_path / name
        folder.mkdir()
        first = api.convert(saved(make_state(VARIANTS[name]), folder / "x.pth"), folder / "first").output
        second = api.convert(first, folder / "second").output
        for file in ("model.safetensors", "config.json"):
            assert (second / file).read_bytes() == (first / file).read_bytes()


def test_synthetic_file_loads_strictly_and_has_the_masks_and_periods_of_the_authors(tmp_path: Path) -> None:
    made = streamconv.synth("dinov3_vits16", tmp_path / "s.pth").backbone
    state = torch.load(made, weights_only=True, mmap=True)
    golden = GOLDEN["dinov3_vits16"]
    assert {key: tuple(value.shape) for key, value in state.items()} == expanded(golden["source"], golden["layers"])
    mask = state["blocks.11.attn.qkv.bias_mask"].chunk(3)
    assert [set(part.tolist()) for part in mask] == [{1.0}, {0.0}, {1.0}]
    assert state["rope_embed.periods"].dtype == torch.bfloat16
    plan = api.plan(made)
    assert plan.model is not None
    assert plan.model.name == "dinov3_vits16"
