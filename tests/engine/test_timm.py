"""Checkpoints in timm's layouts of DINOv2: their outputs, and the notes about them."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import MappingError
from streamconv.planning import plan_json
from tests import api
from tests.checkpoints import State, make_states, original_mapping, prefixed, saved, timm_mapping, timm_state
from tests.file_server import FileServer
from tests.support import run, tiny

# Registers, tokens with position embeddings, and whether the SwiGLU is packed.
LAYOUTS = {
    "reg4": (4, 0, False),
    "giant": (0, 1, True),
    "giant reg8": (8, 0, True),
    "registers with positions": (4, 5, True),
    "no positions of CLS alone": (0, 0, False),
}
MEAN, STD = [0.7, 0.58, 0.7], [0.21, 0.23, 0.18]
CONFIG: dict[str, Any] = {
    "architecture": "vit_giant_patch14_reg4_dinov2",
    "model_args": {"embed_dim": 128, "depth": 3, "num_heads": 4},
    "pretrained_cfg": {"input_size": [3, 56, 56], "crop_pct": 1.0, "mean": MEAN, "std": STD},
}


def ambiguous() -> State:
    """Return 8 registers and 25 positions, which are a grid of 5 x 5, or one of 4 x 4 and 9 tokens."""
    return timm_state(8, 9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_converted_exactly(tmp_path: Path, layout: str) -> None:
    registers, embedded, is_packed = LAYOUTS[layout]
    state = timm_state(registers, embedded, is_packed=is_packed)
    source = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, source, metadata={"format": "pt"})
    done = api.convert(source, tmp_path / "out", num_heads=2)
    expected = safetensors.torch.save(timm_mapping(state), metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    assert done.plan.config["image_size"] == 56
    assert done.plan.config["use_swiglu_ffn"] is is_packed
    assert done.plan.config.get("num_register_tokens", 0) == registers
    assert plan_json.from_json(plan_json.to_json(done.plan)) == done.plan
    assert api.convert(source, tmp_path / "out", num_heads=2).plan == done.plan  # and finds the folder complete


@pytest.mark.parametrize("layout", ["reg4", "registers with positions"])
def test_cast_is_that_of_torch(tmp_path: Path, layout: str) -> None:
    registers, embedded, is_packed = LAYOUTS[layout]
    state = timm_state(registers, embedded, is_packed=is_packed)
    api.convert(saved(state, tmp_path / "pytorch_model.bin"), tmp_path / "out", dtype="bfloat16", num_heads=2)
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    expected = timm_mapping({key: value.bfloat16() for key, value in state.items()})
    assert written.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in written.items())


def test_registers_in_half_precision_are_added_as_torch_adds_them(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        state = {key: value.to(dtype) for key, value in timm_state(4, 5).items()}
        api.convert(saved(state, tmp_path / "x.pth"), tmp_path / str(dtype), num_heads=2)
        written = safetensors.torch.load_file(tmp_path / str(dtype) / "model.safetensors")
        expected = state["reg_token"] + state["pos_embed"][:, 1:5]
        assert torch.equal(written["embeddings.register_tokens"], expected)


def test_layout_is_found_in_a_training_checkpoint(tmp_path: Path) -> None:
    state = timm_state(4, 0, is_packed=True)
    source = saved({"state_dict": prefixed(state, "module.encoder.")}, tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", num_heads=2)
    expected = safetensors.torch.save(timm_mapping(state), metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_plan_states_the_layout_and_what_is_added(tmp_path: Path) -> None:
    source = saved(timm_state(4, 0, is_packed=True), tmp_path / "x.pth")
    notes = api.plan(source).notes
    (layout,) = [note for note in notes if "timm's layout" in note]
    assert "reg_token" in layout
    assert "pos_embed has no row for the CLS token, so a row of zeros is written, which has no effect" in layout
    assert "mlp.fc1 and mlp.fc2 are the w12 and w3 of a SwiGLU" in layout
    assert not any("timm" in note for note in api.plan(saved(timm_state(0, 1), tmp_path / "y.pth")).notes)
    added = api.plan(saved(timm_state(4, 5), tmp_path / "z.pth")).notes
    assert any("the position embeddings of the registers are added to them" in note for note in added)


def test_activation_that_tensors_do_not_show_is_unproved(tmp_path: Path) -> None:
    """Other gated layers have the same shapes; DINOv2's published models of the same width have this one."""
    unproved = api.plan(saved(timm_state(0, 1, is_packed=True), tmp_path / "x.pth"), num_heads=2).unproved
    assert [each.startswith("mlp.fc1 is assumed to be that of timm's SwiGLUPacked") for each in unproved] == [True]
    assert api.plan(saved(timm_state(4, 0), tmp_path / "y.pth"), num_heads=2).unproved == ()


@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_heads_and_image_processor_are_those_of_timms_config(tmp_path: Path, name: str, is_folder: bool) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    state = timm_state(4, 0)
    if name.endswith(".bin"):
        saved(state, folder / name)
    else:
        safetensors.torch.save_file(state, folder / name)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    plan = api.plan(folder if is_folder else folder / name)
    assert (plan.config["num_attention_heads"], plan.assumed_heads, plan.unproved) == (4, None, ())
    processor = plan.image_processor
    assert processor is not None
    assert (processor["image_mean"], processor["image_std"]) == (MEAN, STD)
    assert (processor["size"], processor["crop_size"]) == ({"shortest_edge": 56}, {"height": 56, "width": 56})
    assert "preprocessor_config.json: as the config.json beside the weights states" in plan.notes
    own = api.plan(folder, image_std=0.5).image_processor
    assert own is not None
    assert (own["image_mean"], own["image_std"], own["size"]) == (MEAN, [0.5] * 3, {"shortest_edge": 56})


def test_config_of_another_model_gives_no_image_processor(tmp_path: Path) -> None:
    source = saved(timm_state(4, 0), tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_args": {"embed_dim": 128, "depth": 12}}))
    assert any("that of published dinov2 models" in note for note in api.plan(source).notes)


def test_config_at_a_url_is_read(tmp_path: Path, server: FileServer) -> None:
    saved(timm_state(4, 0), server.folder / "pytorch_model.bin")
    (server.folder / "config.json").write_text(json.dumps(CONFIG))
    done = api.convert(f"{server.url}/pytorch_model.bin", tmp_path / "out")
    assert done.plan.config["num_attention_heads"] == 4
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_bytes())["image_mean"] == MEAN


def test_reverted_model_has_the_authors_layout(tmp_path: Path) -> None:
    state = timm_state(4, 0, is_packed=True)
    api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "out", num_heads=2)
    done = run("revert", "out", "-o", "back.pth", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    back = torch.load(tmp_path / "back.pth")
    assert torch.equal(back["register_tokens"], state["reg_token"])
    assert torch.equal(back["pos_embed"][:, 1:], state["pos_embed"])
    assert not back["pos_embed"][:, 0].any()
    assert torch.equal(back["blocks.0.mlp.w12.weight"], state["blocks.0.mlp.fc1.weight"])
    again = streamconv.convert(tmp_path / "back.pth", tmp_path / "again")
    written = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert not any("timm" in note for note in again.plan.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": torch.ones(1, 18, 128)}, "pos_embed has 18 positions, which are not a square grid"),
        ({"reg_token": torch.ones(1, 4, 64)}, r"wrong shape: reg_token is \[1, 4, 64\], not \[1, 4, 128\]"),
        ({"register_tokens": torch.ones(1, 4, 128)}, "more than a backbone.*\n *reg_token"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(64)}, r"unexpected: blocks\.0\.attn\.q_norm\.weight"),
        ({"head.weight": torch.ones(5, 128), "head.bias": torch.ones(5)}, "the head reads 128 channels"),
        ({"norm.weight": None, "norm.bias": None, "fc_norm.weight": torch.ones(128)}, "only what it has pooled"),
    ],
    ids=["grid", "width", "both registers", "qk norm", "head", "fc_norm"],
)  # fmt: skip
def test_what_transformers_cannot_express_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    state = {key: value for key, value in (timm_state(4, 0) | change).items() if value is not None}
    with pytest.raises(MappingError, match=message):
        api.plan(saved(state, tmp_path / "x.pth"), num_heads=2)


@pytest.mark.parametrize("registers", [0, 4])
def test_lost_position_of_the_cls_token_is_not_taken_for_timms_layout(tmp_path: Path, registers: int) -> None:
    """The authors' and transformers' models have a mask token or register_tokens, which timm's do not have."""
    state, _ = make_states(tiny(registers=registers))
    lost = saved(state | {"pos_embed": state["pos_embed"][:, 1:]}, tmp_path / "x.pth")
    converted = saved(original_mapping(torch.load(lost)), tmp_path / "converted.pth")
    for source in (lost, converted):
        with pytest.raises(MappingError, match="pos_embed has 16 positions, which are not a square grid and a CLS"):
            api.plan(source, num_heads=2)


def test_positions_that_fit_two_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="pos_embed has 25 positions, which may be those of patches alone, or of"):
        api.plan(saved(ambiguous(), tmp_path / "x.pth"), num_heads=2)


def test_a_classifiers_head_can_be_left_out(tmp_path: Path) -> None:
    state = timm_state(4, 0) | {"head.weight": torch.ones(5, 128), "head.bias": torch.ones(5)}
    plan = api.plan(saved(state, tmp_path / "x.pth"), num_heads=2, select="")
    assert plan.architecture == "Dinov2WithRegistersModel"
    assert [each.start for each in plan.skipped] == ["head."]
