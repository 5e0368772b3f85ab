"""Checkpoints of people's own: wrapped, chunked, with heads beside, with tensors that others have and these lack."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersModel

import streamconv
from streamconv import MappingError, OutputError, UsageError
from streamconv.families.dinov2 import Geometry
from tests.conftest import State, make_states, seeds_mapping, tiny
from tests.engine.test_cli import run
from tests.engine.test_convert import contents, flip
from tests.file_server import FileServer

Save = Callable[..., tuple[Path, Path | None]]
HEADS: State = {
    "dino_head.mlp.0.weight": torch.full((4, 128), 7.0),
    "dino_head.norm.bias": torch.full((128,), 7.0),
    "dino_head.last_layer.weight_g": torch.ones(4, 1),
    "ibot_head.norm.bias": torch.full((128,), 8.0),
    "ibot_head.norm.weight": torch.full((128,), 8.0),
}
BESIDE = {"epoch": 3, "args": argparse.Namespace(lr=1e-3), "optimizer": {"state": {0: {"exp_avg": torch.ones(999)}}}}


def chunked(state: State, size: int) -> State:
    """As Meta's vision_transformer.py names blocks that are in lists of ``size``."""
    result: State = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // size))
        result[".".join(parts)] = value
    return result


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def teacher(state: State) -> dict[str, Any]:
    """Meta's teacher_checkpoint.pth."""
    return {"teacher": {**prefixed(state, "backbone."), **HEADS}}


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def wanted(state: State, path: Path) -> bytes:
    """What the safetensors library writes of the original script's mapping."""
    safetensors.torch.save_file(seeds_mapping(state), path, metadata={"format": "pt"})
    return path.read_bytes()


@pytest.mark.parametrize("wrap", ["bare", "teacher"])
@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_every_layout_is_converted_and_computes_the_same(
    tmp_path: Path, swiglu: bool, registers: int, chunk: int, wrap: str
) -> None:
    state, _ = make_states(tiny(swiglu=swiglu, registers=registers))
    named = chunked(state, chunk) if chunk else state
    source = saved({**teacher(named), **BESIDE} if wrap == "teacher" else named, tmp_path / "x.pth")
    streamconv.convert(source, tmp_path / "out")
    output = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert output == wanted(state, tmp_path / "theirs.safetensors")
    found = streamconv.verify(tmp_path / "out", source, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 4, found.checks
    assert found.checks[2].numbers["largest"] <= (1e-15 if swiglu else 0.0)


def nested(state: State, prefix: str) -> dict[str, Any]:
    """``teacher.backbone.`` as dicts: {"teacher": {"backbone": …}}."""
    result: dict[str, Any] = dict(state)
    for part in reversed(prefix.split(".")[:-1]):
        result = {part: result}
    return result


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("wrap", [prefixed, nested])
@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "state_dict.", "module.", "backbone.", "teacher.backbone.", "student.backbone.",
     "state_dict.module.backbone.", "model.teacher.module.backbone.", "model._orig_mod."],
)  # fmt: skip
def test_a_backbone_is_found_under_any_prefix(
    tmp_path: Path, prefix: str, wrap: Callable[[State, str], dict[str, Any]], is_zip: bool
) -> None:
    state, _ = make_states(tiny())
    torch.save(wrap(state, prefix), tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    done = streamconv.convert(tmp_path / "x.pth", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    assert {move.source for move in done.plan.mapping} == {prefix + key for key in state}
    assert done.plan.skipped == ()


def test_heads_beside_a_bare_backbone_are_left_out(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    done = streamconv.convert(saved({**HEADS, **state}, tmp_path / "x.pth"), tmp_path / "out")
    assert [each.start for each in done.plan.skipped] == ["dino_head.", "ibot_head."]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")


def test_a_prefix_is_of_whole_parts(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    with pytest.raises(MappingError, match="is no checkpoint of a model that streamconv knows"):
        streamconv.plan(saved(prefixed(state, "model.my_"), tmp_path / "x.pth"))


@pytest.mark.parametrize("shards", [False, True])
def test_safetensors_of_the_original_layout_are_sources(tmp_path: Path, shards: bool) -> None:
    state, _ = make_states(tiny())
    named = prefixed(chunked(state, 1), "backbone.")
    (tmp_path / "source").mkdir()
    if shards:
        parts = [dict(list(named.items())[i::2]) for i in range(2)]
        files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
        for file, part in zip(files, parts, strict=True):
            safetensors.torch.save_file(part, tmp_path / "source" / file)
        weight_map = {key: file for file, part in zip(files, parts, strict=True) for key in part}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / "source" / "model.safetensors.index.json").write_text(index)
    else:
        safetensors.torch.save_file(named, tmp_path / "source" / "model.safetensors")
    streamconv.convert(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    assert streamconv.verify(tmp_path / "out", tmp_path / "source", device="cpu").passed


def test_what_stays_behind_is_told_and_never_read(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved({**teacher(state), **BESIDE}, tmp_path / "x.pth")
    flip(source, "teacher.dino_head.norm.bias", 5)
    flip(source, "optimizer.state.0.exp_avg", 5)  # a conversion that read it would see that its CRC-32 is wrong
    done = run("convert", "x.pth", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in (
        "skipped: teacher.dino_head.* (3 tensors, 2,576 bytes): a head of the training",
        "skipped: teacher.ibot_head.* (2 tensors, 1,024 bytes): a head of the training",
        "skipped: optimizer.* (1 tensor, 3,996 bytes): an optimizer's state",
    ):
        assert line in done.stdout
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_bytes())
    assert len(manifest["skipped"]) == 3
    planned = json.loads(run("plan", "x.pth", "--json", cwd=tmp_path).stdout)
    assert [each["start"] for each in planned["skipped"]] == ["teacher.dino_head.", "teacher.ibot_head.", "optimizer."]


def test_of_a_training_checkpoint_at_an_address_the_backbone_is_fetched_only(
    tmp_path: Path, server: FileServer
) -> None:
    state, _ = make_states(tiny())
    beside = {"optimizer": {"state": {i: {"exp_avg": torch.rand(300_000)} for i in range(20)}}}
    torch.save({**teacher(state), **beside}, tmp_path / "served" / "x.pth")
    streamconv.convert(f"{server.url}/x.pth", tmp_path / "out", stream=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    weights = sum(value.nbytes for value in state.values())
    assert weights < server.sent < weights + 2_000_000 < 24_000_000


def test_several_backbones_are_refused_until_one_is_selected(tmp_path: Path) -> None:
    states = {name: make_states(tiny(), seed)[0] for seed, name in enumerate(("teacher", "student"))}
    whole = {name: {**prefixed(state, "backbone."), **HEADS} for name, state in states.items()}
    source = saved({"model": whole, "optimizer": {"state": {0: torch.ones(3)}}}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"several backbones. Choose one by --select PREFIX") as caught:
        streamconv.plan(source)
    assert list(caught.value.problems) == ["model.teacher.backbone. 49 tensors", "model.student.backbone. 49 tensors"]
    for name, state in states.items():
        for select in (f"model.{name}.backbone", f"model.{name}.backbone."):
            done = streamconv.convert(source, tmp_path / name, select=select)
        assert (tmp_path / name / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
        others = next(other for other in states if other != name)
        left = {each.start: each.reason for each in done.plan.skipped}
        assert left[f"model.{others}."] == "not selected"
        assert left[f"model.{name}.dino_head."].startswith("a head of the training")
        # The manifest knows what was selected.
        assert streamconv.verify(tmp_path / name, source, device="cpu").passed
    wrong = streamconv.verify(tmp_path / "teacher", source, select="model.student.backbone", device="cpu", parity=False)
    assert wrong.checks[0].passed is False
    assert streamconv.plan(source, select="teacher.backbone").mapping[0].source == "model.teacher.backbone.cls_token"
    says = r"does not have .* Say --select model.teacher.backbone or --select model.student.backbone"
    for select in ("backbone", "", "model", "eacher.backbone"):
        with pytest.raises(UsageError, match=says):
            streamconv.plan(source, select=select)
    told = run("plan", "x.pth", cwd=tmp_path)
    assert told.returncode == 3
    assert "model.student.backbone. 49 tensors" in told.stderr
    assert run("run", "x.pth", "-o", "o", "--select", "model.student.backbone", cwd=tmp_path).returncode == 0


def test_a_backbone_beside_the_bare_one_takes_a_selection(tmp_path: Path) -> None:
    state, other = (make_states(tiny(), seed)[0] for seed in (0, 1))
    source = saved({**state, "ema": other}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match="several backbones") as caught:
        streamconv.plan(source)
    assert list(caught.value.problems) == ["(none) 98 tensors", "ema. 49 tensors"]
    streamconv.convert(source, tmp_path / "ema", select="ema")
    assert (tmp_path / "ema" / "model.safetensors").read_bytes() == wanted(other, tmp_path / "theirs.safetensors")


def test_unknown_tensors_beside_a_backbone_take_the_users_word(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved({"model": {**prefixed(state, "net."), "head.weight": torch.ones(5, 128)}}, tmp_path / "x.pth")
    with pytest.raises(
        MappingError, match=r"more than a backbone. To leave these out, say --select model.net:"
    ) as caught:
        streamconv.plan(source)
    assert list(caught.value.problems) == ["model.head.weight [5, 128]"]
    done = streamconv.convert(source, tmp_path / "out", select="model.net")
    assert [str(each) for each in done.plan.skipped] == ["model.head.* (1 tensor, 2,560 bytes): not selected"]
    # Within a backbone nothing is left out that no rule names.
    within = saved({"model": {**prefixed(state, "net."), "net.head.weight": torch.ones(5, 128)}}, tmp_path / "z.pth")
    with pytest.raises(MappingError, match=r"unexpected: model.net.head.weight \[5, 128\]"):
        streamconv.plan(within)
    inside = saved({**state, "head.weight": torch.ones(5, 128)}, tmp_path / "y.pth")
    for select in (None, ""):
        with pytest.raises(MappingError, match=r"unexpected: head.weight \[5, 128\]"):
            streamconv.plan(inside, select=select)


def test_what_training_keeps_beside_is_left_out(tmp_path: Path) -> None:
    """An optimizer by its state's layout, whatever it is called; counters and random states; DINO's first head."""
    state, _ = make_states(tiny())
    beside = {
        "adam": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(9)}, 1: {"exp_avg": torch.ones(2)}}},
        "scaler": {"scale": torch.tensor(2.0)},
        "rng": torch.ones(5, dtype=torch.uint8),
        "teacher": {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)},
    }
    teacher = {**prefixed(state, "backbone."), **beside.pop("teacher")}  # type: ignore[dict-item]
    done = streamconv.convert(saved({"teacher": teacher, **beside}, tmp_path / "x.pth"), tmp_path / "out")
    assert [str(each) for each in done.plan.skipped] == [
        "teacher.head.mlp.* (1 tensor, 16 bytes): a head of the training, which no class of transformers has",
        "teacher.head.last_layer.* (1 tensor, 8 bytes): a head of the training, which no class of transformers has",
        "adam.state.* (3 tensors, 48 bytes): an optimizer's state",
        "scaler.scale (1 tensor, 4 bytes): a number of the training's",
        "rng (1 tensor, 5 bytes): a number of the training's",
    ]


@pytest.mark.parametrize("layout", [[0, 0, 1], [1, 1, 0], [0, 1, 1], [2, 1, 0]])
def test_chunks_that_no_authors_code_makes_are_refused(tmp_path: Path, layout: list[int]) -> None:
    state, _ = make_states(tiny())
    named = {}
    for key, value in state.items():
        block = key.split(".")[1] if key.startswith("blocks.") else None
        named[key if block is None else f"blocks.{layout[int(block)]}.{key.removeprefix('blocks.')}"] = value
    with pytest.raises(MappingError, match="in chunks, and not in those of any block_chunks of DinoVisionTransformer"):
        streamconv.plan(saved(named, tmp_path / "x.pth"))


class Settings2(dict):  # type: ignore[type-arg]
    """As configurations of several libraries are: torch refuses to fill it."""


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("what", ["a namespace", "a dict of its own class", "a whole module"])
@pytest.mark.filterwarnings("ignore")
def test_what_torch_does_not_load_is_verified_all_the_same(tmp_path: Path, what: str, is_zip: bool) -> None:
    state, _ = make_states(tiny())
    settings = {
        "a namespace": argparse.Namespace(lr=1), "a dict of its own class": Settings2(lr=1),
        "a whole module": torch.nn.Linear(2, 2),
    }[what]  # fmt: skip
    saved_as = {"model": state, "settings": settings}
    torch.save(saved_as, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    streamconv.convert(tmp_path / "x.pth", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    found = streamconv.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 4, found.checks
    assert found.checks[2].numbers["largest"] == 0.0
    is_loaded = is_zip and what != "a dict of its own class"
    assert ("streamconv read its tensors" in found.checks[2].not_checked) is not is_loaded
    wrong = {**state, "blocks.1.norm1.bias": state["blocks.1.norm1.bias"] + 1}
    torch.save({**saved_as, "model": wrong}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    assert streamconv.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu").checks[2].passed is False


def test_objects_instead_of_a_dict_are_named(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    with pytest.raises(MappingError, match="holds objects, which are not read, and no tensor in a plain") as caught:
        streamconv.plan(saved({"model": Settings2(state)}, tmp_path / "x.pth"))
    assert list(caught.value.problems) == [f"model is a {Settings2.__module__}.Settings2"]


def test_a_shard_of_fsdp_beside_a_whole_backbone_is_no_obstacle(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved({"teacher": state, "student": {"_flat_param": torch.ones(9)}}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match="To leave these out, say --select teacher"):
        streamconv.plan(source)
    assert [each.start for each in streamconv.plan(source, select="teacher").skipped] == ["student."]


def test_a_classifier_takes_no_second_head(tmp_path: Path) -> None:
    backbone, head = make_states(tiny(classes=5))
    source, head_path = saved(backbone, tmp_path / "x.pth"), saved(head, tmp_path / "h.pth")
    folder = streamconv.convert(source, tmp_path / "out", head=head_path).output
    with pytest.raises(UsageError, match=r"is a classifier, and has its head\. Leave --head out"):
        streamconv.plan(folder, head=head_path)


def test_the_number_of_heads_is_told_by_verification(tmp_path: Path) -> None:
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    streamconv.convert(source, tmp_path / "out", num_heads=4)
    found = streamconv.verify(tmp_path / "out", source, device="cpu")
    assert "assuming 4 attention heads in both, which tensors do not show" in found.checks[2].proves


def test_an_image_processor_of_another_size_is_told(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    (note,) = (note for note in streamconv.plan(saved(state, tmp_path / "x.pth")).notes if "processor" in note)
    assert "224 x 224" in note
    assert "the model's own size is 56" in note


def test_two_names_for_one_block_are_refused(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    twice = {**chunked(state, 2), "blocks.0.2.norm1.bias": torch.ones(128)}
    with pytest.raises(MappingError) as caught:
        streamconv.plan(saved(twice, tmp_path / "x.pth"))
    assert list(caught.value.problems) == [
        "blocks.1.2.norm1.bias and blocks.0.2.norm1.bias are both blocks.2.norm1.bias"
    ]
    local = {key.replace("blocks.1.2.", "blocks.1.0."): value for key, value in chunked(state, 2).items()}
    with pytest.raises(MappingError, match=r"blocks.0.0.norm1.bias and blocks.1.0.norm1.bias are both"):
        streamconv.plan(saved(local, tmp_path / "x.pth"))


class ShardedTensor:
    """As FSDP saves a flat parameter: of a class that takes a process group to load."""


@pytest.mark.parametrize("value", [torch.ones(1000), ShardedTensor()])
def test_shards_of_fsdp_are_refused_with_what_to_use_instead(tmp_path: Path, value: object) -> None:
    long = "_fsdp_wrapped_module." * 6
    flat = {"_flat_param": value, f"blocks.0.{long}_flat_param": value}
    source = saved({"model": flat}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"(?s)FSDP cut up.*teacher_checkpoint.pth.*FULL_STATE_DICT") as caught:
        streamconv.plan(source)
    assert set(caught.value.problems) == {f"model.{name}" for name in flat}


@pytest.mark.parametrize("wrap", ["", "state_dict."])
def test_heads_for_depth_and_segmentation_are_refused_with_the_reason(tmp_path: Path, wrap: str) -> None:
    head = prefixed({"decode_head.conv_depth.weight": torch.ones(1, 4, 1, 1)}, wrap)
    with pytest.raises(MappingError, match="a head for depth or segmentation, which no class of transformers has"):
        streamconv.plan(saved(head, tmp_path / "x.pth"))
    state, _ = make_states(tiny())
    both = {**prefixed(state, f"{wrap}backbone."), **head}
    with pytest.raises(MappingError, match="a head for depth or segmentation") as caught:
        streamconv.plan(saved(both, tmp_path / "y.pth"))
    assert f"--select {wrap}backbone" in str(caught.value)
    assert streamconv.plan(tmp_path / "y.pth", select=f"{wrap}backbone").skipped[0].tensors == 1


def test_a_head_over_four_layers_is_refused_with_the_reason(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved(state, tmp_path / "x.pth")
    head = saved({"weight": torch.ones(3, 5 * 128), "bias": torch.ones(3)}, tmp_path / "head.pth")
    with pytest.raises(MappingError, match="the head is one over 4 layers: transformers has classes for"):
        streamconv.plan(source, head=head)


LACKING: dict[str, tuple[Geometry, str]] = {
    "no LayerScale": (replace(tiny(), has_layer_scale=False), "the source has no LayerScale: ones are written"),
    "no mask token": (replace(tiny(), has_mask_token=False), ""),
    "registers and no mask token": (
        replace(tiny(registers=4), has_mask_token=False), "the source has no mask token: zeros are written"
    ),
    "no bias of q, k and v": (replace(tiny(), has_qkv_bias=False), ""),
    "larger patches": (replace(tiny(), patch=16), ""),
    "another grid": (replace(tiny(), positions=50), ""),
    "four heads": (replace(tiny(), heads=4), "4 attention heads, as --num-heads or config.json says"),
    "large heads": (tiny(hidden=1664, layers=1), "13 attention heads, of 128 channels as in the family's published"),
}  # fmt: skip


@pytest.mark.parametrize("what", LACKING)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_models_that_lack_something_or_have_other_sizes(tmp_path: Path, what: str, dtype: str | None) -> None:
    geometry, told = LACKING[what]
    state, _ = make_states(geometry)
    source = saved(state, tmp_path / "x.pth")
    said = {"num_heads": geometry.heads, "dtype": dtype}
    done = streamconv.convert(source, tmp_path / "out", **said)  # type: ignore[arg-type]
    assert told in " ".join(done.plan.notes)
    found = streamconv.verify(tmp_path / "out", source, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 4, found.checks
    assert found.checks[2].numbers["largest"] == 0.0
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["patch_size"] == geometry.patch
    assert config["image_size"] == geometry.patch * math.isqrt(geometry.positions - 1)
    assert config["qkv_bias"] is geometry.has_qkv_bias
    assert config["num_attention_heads"] == {"four heads": 4, "large heads": 13}.get(what, 2)
    kind = Dinov2WithRegistersModel if geometry.registers else Dinov2Model
    _, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    if not geometry.has_layer_scale:
        scales = [value for name, value in tensors.items() if name.endswith(".lambda1")]
        assert len(scales) == 2 * geometry.layers
        assert all(torch.equal(scale.float(), torch.ones(128)) for scale in scales)
    if geometry.registers:
        assert torch.equal(tensors["embeddings.mask_token"].float(), torch.zeros(1, 128))
    else:
        assert config["use_mask_token"] is geometry.has_mask_token is ("embeddings.mask_token" in tensors)
    assert done.plan.parameters == sum(value.numel() for value in tensors.values())


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_filled_in_has_the_others_dtype(tmp_path: Path, stored: torch.dtype) -> None:
    state, _ = make_states(replace(tiny(registers=4), has_layer_scale=False, has_mask_token=False))
    source = saved({name: value.to(stored) for name, value in state.items()}, tmp_path / "x.pth")
    streamconv.convert(source, tmp_path / "out", max_shard_size="100KB")
    with streamconv.open_checkpoint(tmp_path / "out") as output:
        ones = output["encoder.layer.2.layer_scale2.lambda1"]
        assert bytes(ones.tobytes()) == torch.ones(128, dtype=stored).view(torch.uint8).numpy().tobytes()
        assert not any(output["embeddings.mask_token"].tobytes())


def test_some_layer_scales_are_missing_ones(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    del state["blocks.1.ls2.gamma"], state["blocks.2.attn.qkv.bias"]
    with pytest.raises(MappingError) as caught:
        streamconv.plan(saved(state, tmp_path / "x.pth"))
    assert list(caught.value.problems) == ["missing: blocks.1.ls2.gamma [128]", "missing: blocks.2.attn.qkv.bias [384]"]


def test_a_tensor_of_a_class_that_is_not_read_is_named(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    state["norm.bias"] = state["norm.bias"].to_sparse()
    with pytest.raises(MappingError) as caught:
        streamconv.plan(saved({"model": state}, tmp_path / "x.pth"))
    assert list(caught.value.problems) == [
        "model.norm.bias is a torch._utils._rebuild_sparse_tensor, which is not read",
        "missing: norm.bias [128]",
    ]


def test_what_is_no_tensor_elsewhere_is_no_matter(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    others = {"norm.bias": argparse.Namespace(), "model.args": argparse.Namespace()}
    assert streamconv.plan(saved({"model": state, **others}, tmp_path / "x.pth")).skipped == ()


def test_heads_are_said_by_the_family_or_by_the_user(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved(state, tmp_path / "x.pth")
    told = run("plan", "x.pth", cwd=tmp_path).stdout
    assert "2 attention heads, of 64 channels as in the family's published models: no tensor says how many" in told
    said = run("plan", "x.pth", "--num-heads", "4", cwd=tmp_path).stdout
    assert "4 attention heads, as --num-heads or config.json says" in said
    assert streamconv.plan(source, num_heads=2).fingerprint == streamconv.plan(source).fingerprint
    for heads, error in ((3, MappingError), (0, UsageError), (-1, UsageError)):
        with pytest.raises(error, match="--num-heads"):
            streamconv.plan(source, num_heads=heads)
    # Of a published model the number is known, and not told; another one makes it no published model.
    small, _ = make_states(tiny(layers=12, hidden=384))
    small["pos_embed"] = torch.zeros(1, 1370, 384)
    published = saved(small, tmp_path / "small.pth")
    assert streamconv.plan(published).notes == ()
    assert streamconv.plan(published).model is not None
    assert streamconv.plan(published, num_heads=6).model is not None
    assert streamconv.plan(published, num_heads=12).model is None
    # Another number than it was trained with is found by who verifies with the right one.
    streamconv.convert(source, tmp_path / "out", num_heads=4)
    found = streamconv.verify(tmp_path / "out", source, num_heads=2, device="cpu")
    assert [check.passed for check in found.checks[:3:2]] == [False, False]


def test_a_manifest_that_someone_altered_selects_nothing(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved(state, tmp_path / "x.pth")
    streamconv.convert(source, tmp_path / "out")
    path = tmp_path / "out" / "streamconv.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps({**manifest, "select": ["x"], "num_heads": "4"}))
    assert streamconv.verify(tmp_path / "out", source, device="cpu", parity=False).passed


def test_an_interrupted_conversion_with_fillings_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.test_resume import interrupt_after

    monkeypatch.setattr("streamconv.output.writer.SYNC_BYTES", 20_000)
    state, _ = make_states(replace(tiny(), has_layer_scale=False))
    source = saved(teacher(state), tmp_path / "x.pth")
    streamconv.convert(source, tmp_path / "whole")
    interrupt_after(monkeypatch, source, tmp_path / "out", 0.5)
    assert streamconv.convert(source, tmp_path / "out").resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize("limit", ["5GB", "200KB"])
def test_what_was_converted_is_a_source(
    tmp_path: Path, swiglu: bool, registers: int, classes: int | None, limit: str
) -> None:
    """Cast and cut anew, it is what the original gives at once; the labels stay."""
    backbone, head = make_states(tiny(swiglu, classes, registers=registers))
    source = saved(backbone, tmp_path / "x.pth")
    given: dict[str, Any] = {}
    if classes:
        (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\n")
        given = {"head": saved(head, tmp_path / "h.pth"), "labels": tmp_path / "labels.txt"}
    streamconv.convert(source, tmp_path / "first", max_shard_size=limit, **given)
    done = streamconv.convert(tmp_path / "first", tmp_path / "second", dtype="bfloat16", max_shard_size="150KB")
    streamconv.convert(source, tmp_path / "at once", dtype="bfloat16", max_shard_size="150KB", **given)
    ours, theirs = contents(tmp_path / "second"), contents(tmp_path / "at once")
    assert done.labels_from == ("config.json of what was converted" if classes else None)
    del ours["streamconv.json"], theirs["streamconv.json"]
    assert ours == theirs
    found = streamconv.verify(tmp_path / "second", tmp_path / "first", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 4, found.checks
    assert found.checks[2].numbers["largest"] <= 1e-13


def test_what_transformers_saved_is_a_source(tmp_path: Path, server: FileServer) -> None:
    """Its heads are those of its config.json; at an address it is read as any other file."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes))
    model.save_pretrained(tmp_path / "theirs")
    streamconv.convert(tmp_path / "theirs", tmp_path / "ours")
    again = Dinov2Model.from_pretrained(tmp_path / "ours")
    assert again.config.num_attention_heads == 3
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert streamconv.verify(tmp_path / "ours", tmp_path / "theirs", device="cpu").passed
    (tmp_path / "served" / "x.safetensors").write_bytes((tmp_path / "theirs" / "model.safetensors").read_bytes())
    address = f"{server.url}/x.safetensors"
    with pytest.raises(MappingError, match=r"hidden size 96 cannot be cut into heads as .* by --num-heads"):
        streamconv.plan(address)
    streamconv.convert(address, tmp_path / "far", num_heads=3, dtype="float16", stream=True)
    found = streamconv.verify(tmp_path / "far", address, stream=True, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 4, found.checks


def test_a_converted_model_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    folder = streamconv.convert(source, tmp_path / "out").output
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.attention.attention.key.weight"]
    tensors["more"] = torch.ones(3)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MappingError) as caught:
        streamconv.plan(folder)
    assert sorted(caught.value.problems) == [
        "missing: blocks.1.attn.qkv.weight [384, 128]",
        "unexpected: encoder.layer.1.attention.attention.query.weight [128, 128]",
        "unexpected: encoder.layer.1.attention.attention.value.weight [128, 128]",
        "unexpected: more [3]",
    ]
    told = run("plan", "out", cwd=tmp_path)
    assert told.returncode == 3
    safetensors.torch.save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(MappingError, match="is no checkpoint of a model that streamconv knows"):
        streamconv.plan(folder)


def test_a_configuration_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    folder = streamconv.convert(saved(make_states(tiny())[0], tmp_path / "x.pth"), tmp_path / "out").output
    config = json.loads((folder / "config.json").read_bytes())
    changed = {**config, "layer_norm_eps": 1e-5, "hidden_act": "relu", "drop_path_rate": 0.1, "mine": 3}
    (folder / "config.json").write_text(json.dumps(changed))
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(MappingError) as caught:
            streamconv.plan(source)
        assert sorted(caught.value.problems) == [
            "its config.json says hidden_act 'relu', and streamconv's models have 'gelu'",
            "its config.json says layer_norm_eps 1e-05, and streamconv's models have 1e-06",
        ]
    (folder / "config.json").write_text(json.dumps({**config, "drop_path_rate": 0.1}))
    assert "config.json and preprocessor_config.json are written anew" in streamconv.plan(folder).notes
    (folder / "config.json").write_text("[")
    assert streamconv.plan(folder).config == config


def test_a_folder_is_not_converted_into_itself(tmp_path: Path) -> None:
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    folder = streamconv.convert(source, tmp_path / "out").output
    before = contents(folder)
    with pytest.raises((UsageError, OutputError)):
        streamconv.convert(folder, folder, dtype="bfloat16")
    assert contents(folder) == before
