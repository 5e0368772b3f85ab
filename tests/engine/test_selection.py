"""Unpublished checkpoints: wrapped, chunked, with heads beside the backbone, with tensors added or missing."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import MappingError, OutputError, UsageError
from streamconv.tensors.evaluation import read_bytes
from tests import api
from tests.checkpoints import (
    BESIDE,
    HEADS,
    State,
    checkpoint_with_settings,
    chunked,
    make_states,
    original_mapping,
    prefixed,
    save_sharded,
    saved,
    teacher,
    wanted,
)
from tests.file_server import FileServer
from tests.support import contents, flip, run, tiny


def nested(state: State, prefix: str) -> dict[str, Any]:
    """Return a prefix such as ``teacher.backbone.`` as nested dicts: {"teacher": {"backbone": …}}."""
    result: dict[str, Any] = dict(state)
    for part in reversed(prefix.split(".")[:-1]):
        result = {part: result}
    return result


@pytest.mark.parametrize("wrap", ["bare", "teacher"])
@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_every_layout_gives_the_same_bytes(tmp_path: Path, swiglu: bool, registers: int, chunk: int, wrap: str) -> None:
    state, _ = make_states(tiny(swiglu=swiglu, registers=registers))
    named = chunked(state, chunk) if chunk else state
    source = saved({**teacher(named), **BESIDE} if wrap == "teacher" else named, tmp_path / "x.pth")
    api.convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("what", ["a namespace", "a dict of its own class", "a whole module"])
@pytest.mark.filterwarnings("ignore")
def test_checkpoint_that_torch_cannot_load_is_converted(tmp_path: Path, what: str, is_zip: bool) -> None:
    state, checkpoint = checkpoint_with_settings(what)
    torch.save(checkpoint, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    api.convert(tmp_path / "x.pth", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")


@pytest.mark.parametrize(("wrap", "is_zip"), [(prefixed, True), (nested, False)])
@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "state_dict.", "module.", "backbone.", "teacher.backbone.", "student.backbone.",
     "state_dict.module.backbone.", "model.teacher.module.backbone.", "model._orig_mod."],
)  # fmt: skip
def test_backbone_is_found_under_any_prefix(
    tmp_path: Path, prefix: str, wrap: Callable[[State, str], dict[str, Any]], is_zip: bool
) -> None:
    state, _ = make_states(tiny())
    torch.save(wrap(state, prefix), tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    done = api.convert(tmp_path / "x.pth", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    assert {move.source for move in done.plan.mapping} == {prefix + key for key in state}
    assert done.plan.skipped == ()


def test_heads_beside_a_bare_backbone_are_skipped(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    done = api.convert(saved({**HEADS, **state}, tmp_path / "x.pth"), tmp_path / "out")
    assert [each.start for each in done.plan.skipped] == ["dino_head.", "ibot_head."]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")


def test_prefix_must_consist_of_whole_name_parts(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    with pytest.raises(MappingError, match="is not a checkpoint of a model that streamconv knows"):
        api.plan(saved(prefixed(state, "model.my_"), tmp_path / "x.pth"))


@pytest.mark.parametrize("shards", [False, True])
def test_safetensors_with_original_names_can_be_converted(tmp_path: Path, shards: bool) -> None:
    state, _ = make_states(tiny())
    named = prefixed(chunked(state, 1), "backbone.")
    if shards:
        save_sharded(named, tmp_path / "source")
    else:
        (tmp_path / "source").mkdir()
        safetensors.torch.save_file(named, tmp_path / "source" / "model.safetensors")
    api.convert(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")


def test_skipped_tensors_are_reported_and_never_read(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved({**teacher(state), **BESIDE}, tmp_path / "x.pth")
    flip(source, "teacher.dino_head.norm.bias", 5)
    flip(source, "optimizer.state.0.exp_avg", 5)  # a conversion that read it would find a wrong CRC-32
    done = run("convert", "x.pth", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in (
        "skipped: teacher.dino_head.* (3 tensors, 2.6 kB): a head for training only",
        "skipped: teacher.ibot_head.* (2 tensors, 1.0 kB): a head for training only",
        "skipped: optimizer.* (1 tensor, 4.0 kB): optimizer state",
    ):
        assert line in done.stdout
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_bytes())
    assert len(manifest["skipped"]) == 3
    planned = json.loads(run("plan", "x.pth", "--json", cwd=tmp_path).stdout)
    assert [each["start"] for each in planned["skipped"]] == ["teacher.dino_head.", "teacher.ibot_head.", "optimizer."]


def test_only_the_backbone_of_a_remote_training_checkpoint_is_fetched(tmp_path: Path, server: FileServer) -> None:
    state, _ = make_states(tiny())
    beside = {"optimizer": {"state": {i: {"exp_avg": torch.rand(300_000)} for i in range(20)}}}
    torch.save({**teacher(state), **beside}, tmp_path / "served" / "x.pth")
    api.convert(f"{server.url}/x.pth", tmp_path / "out", stream=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    weights = sum(value.nbytes for value in state.values())
    assert weights < server.sent < weights + 2_000_000 < 24_000_000


def test_several_backbones_require_a_selection(tmp_path: Path) -> None:
    states = {name: make_states(tiny(), seed)[0] for seed, name in enumerate(("teacher", "student"))}
    whole = {name: {**prefixed(state, "backbone."), **HEADS} for name, state in states.items()}
    source = saved({"model": whole, "optimizer": {"state": {0: torch.ones(3)}}}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"several backbones. Choose one with --select PREFIX") as caught:
        api.plan(source)
    assert list(caught.value.problems) == ["model.teacher.backbone. 49 tensors", "model.student.backbone. 49 tensors"]
    for name, state in states.items():
        for select in (f"model.{name}.backbone", f"model.{name}.backbone."):
            done = api.convert(source, tmp_path / name, select=select)
        assert (tmp_path / name / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
        others = next(other for other in states if other != name)
        left = {each.start: each.reason for each in done.plan.skipped}
        assert left[f"model.{others}."] == "not selected"
        assert left[f"model.{name}.dino_head."].startswith("a head for training only")
    assert api.plan(source, select="teacher.backbone").mapping[0].source == "model.teacher.backbone.cls_token"
    message = r"does not have .* Use --select model.teacher.backbone or --select model.student.backbone"
    for select in ("backbone", "", "model", "ema"):
        with pytest.raises(UsageError, match=message):
            api.plan(source, select=select)
    bare = saved(states["teacher"], tmp_path / "bare.pth")
    with pytest.raises(UsageError, match=r"under teacher, but one without a prefix\. Omit --select\.$"):
        api.plan(bare, select="teacher")
    with pytest.raises(UsageError, match=r"Use --select model.teacher.backbone.$"):
        api.plan(source, select="eacher.backbone")
    done = run("plan", "x.pth", cwd=tmp_path)
    assert done.returncode == 3
    assert "model.student.backbone. 49 tensors" in done.stderr
    assert run("convert", "x.pth", "-o", "o", "--select", "model.student.backbone", cwd=tmp_path).returncode == 0


def test_backbone_beside_a_bare_one_requires_a_selection(tmp_path: Path) -> None:
    state, other = (make_states(tiny(), seed)[0] for seed in (0, 1))
    source = saved({**state, "ema": other}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match="several backbones") as caught:
        api.plan(source)
    assert list(caught.value.problems) == ["(none) 98 tensors", "ema. 49 tensors"]
    api.convert(source, tmp_path / "ema", select="ema")
    assert (tmp_path / "ema" / "model.safetensors").read_bytes() == wanted(other, tmp_path / "theirs.safetensors")


def test_unknown_tensors_beside_a_backbone_require_a_selection(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved({"model": {**prefixed(state, "net."), "head.weight": torch.ones(5, 128)}}, tmp_path / "x.pth")
    with pytest.raises(
        MappingError, match=r"more than a backbone. To skip other tensors, use --select model.net:"
    ) as caught:
        api.plan(source)
    assert list(caught.value.problems) == ["model.head.weight [5, 128]"]
    done = api.convert(source, tmp_path / "out", select="model.net")
    assert [str(each) for each in done.plan.skipped] == ["model.head.* (1 tensor, 2,560 bytes): not selected"]


@pytest.mark.parametrize("prefix", ["", "model.net."])
def test_unknown_modules_of_a_backbone_require_a_selection(tmp_path: Path, prefix: str) -> None:
    """Fine-tuning adds heads, norms and counters to a bare backbone. Inside its own modules, nothing is skipped."""
    state, _ = make_states(tiny())
    added: State = {
        "head.weight": torch.ones(5, 128), "head.bias": torch.ones(5), "fc_norm.weight": torch.ones(128),
        "queue_ptr": torch.zeros(1, dtype=torch.int64), "bn.num_batches_tracked": torch.tensor(3),
    }  # fmt: skip
    source = saved(prefixed({**state, **added}, prefix), tmp_path / "x.pth")
    option = f"--select {prefix.rstrip('.') or repr('')}"
    with pytest.raises(MappingError, match=f"To skip other tensors, use {option}:") as caught:
        api.plan(source)
    assert len(caught.value.problems) == len(added)
    assert caught.value.problems[0].startswith(f"{prefix}head.weight [5, 128]: the head reads 128 channels, such as")
    done = api.convert(source, tmp_path / "out", select=prefix)
    assert {each.start for each in done.plan.skipped} == {
        f"{prefix}{start}" for start in ("head.", "fc_norm.", "queue_ptr", "bn.")
    }
    assert {each.reason for each in done.plan.skipped} == {"not selected"}
    assumed = f"{prefix}fc_norm.: left out, and assumed not to change the backbone's outputs"
    assert assumed in done.plan.notes
    assert assumed in done.plan.unproved
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    within = saved(prefixed({**state, "blocks.0.extra.weight": torch.ones(5)}, prefix), tmp_path / "y.pth")
    for select in (None, prefix):
        with pytest.raises(MappingError, match=rf"unexpected: {prefix}blocks.0.extra.weight \[5\]"):
            api.plan(within, select=select)


def test_unknown_modules_are_listed_together_with_what_is_missing(tmp_path: Path) -> None:
    """Skipping them would not make the model complete, so no selection is suggested."""
    state, _ = make_states(tiny())
    del state["norm.bias"]
    source = saved({**state, "fc_norm.bias": torch.ones(128)}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"\(2 problems\)") as caught:
        api.plan(source)
    assert list(caught.value.problems) == ["missing: norm.bias [128]", "unexpected: fc_norm.bias [128]"]


def test_training_state_beside_a_backbone_is_skipped(tmp_path: Path) -> None:
    """An optimizer under any name is recognised by the layout of its state; counters, random states, DINO's head."""
    state, _ = make_states(tiny())
    beside = {
        "adam": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(9)}, 1: {"exp_avg": torch.ones(2)}}},
        "scaler": {"scale": torch.tensor(2.0)},
        "rng": torch.ones(5, dtype=torch.uint8),
        "teacher": {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)},
    }
    teacher = {**prefixed(state, "backbone."), **beside.pop("teacher")}  # type: ignore[dict-item]
    done = api.convert(saved({"teacher": teacher, **beside}, tmp_path / "x.pth"), tmp_path / "out")
    assert [str(each) for each in done.plan.skipped] == [
        "teacher.head.mlp.* (1 tensor, 16 bytes): a head for training only, which no transformers class has",
        "teacher.head.last_layer.* (1 tensor, 8 bytes): a head for training only, which no transformers class has",
        "adam.state.* (3 tensors, 48 bytes): optimizer state",
        "scaler.scale (1 tensor, 4 bytes): training state",
        "rng (1 tensor, 5 bytes): training state",
    ]


@pytest.mark.parametrize("layout", [[0, 0, 1], [1, 1, 0], [0, 1, 1], [2, 1, 0]])
def test_impossible_block_chunks_are_refused(tmp_path: Path, layout: list[int]) -> None:
    state, _ = make_states(tiny())
    named = {}
    for key, value in state.items():
        block = key.split(".")[1] if key.startswith("blocks.") else None
        named[key if block is None else f"blocks.{layout[int(block)]}.{key.removeprefix('blocks.')}"] = value
    with pytest.raises(MappingError, match="its blocks are in lists of unequal lengths, or in the wrong order"):
        api.plan(saved(named, tmp_path / "x.pth"))


def test_objects_instead_of_a_dict_are_named(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="holds objects, which are not read, and no tensor") as caught:
        api.plan(saved({"model": argparse.Namespace(lr=1)}, tmp_path / "x.pth"))
    assert list(caught.value.problems) == ["model is a argparse.Namespace"]


def test_fsdp_shard_beside_a_complete_backbone_can_be_skipped(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved({"teacher": state, "student": {"_flat_param": torch.ones(9)}}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match="To skip other tensors, use --select teacher"):
        api.plan(source)
    assert [each.start for each in api.plan(source, select="teacher").skipped] == ["student."]


def test_classifier_with_a_second_head_is_refused(tmp_path: Path) -> None:
    backbone, head = make_states(tiny(classes=5))
    source, head_path = saved(backbone, tmp_path / "x.pth"), saved(head, tmp_path / "h.pth")
    folder = api.convert(source, tmp_path / "out", head=head_path).output
    with pytest.raises(UsageError, match=r"is a classifier and already has its head\. Omit --head"):
        api.plan(folder, head=head_path)


def test_image_processor_of_another_size_is_noted(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    (note,) = (note for note in api.plan(saved(state, tmp_path / "x.pth")).notes if "processor" in note)
    assert "224 x 224" in note
    assert "the model's native size is 56" in note


def test_two_names_for_one_block_are_refused(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    twice = {**chunked(state, 2), "blocks.0.2.norm1.bias": torch.ones(128)}
    with pytest.raises(MappingError) as caught:
        api.plan(saved(twice, tmp_path / "x.pth"))
    assert list(caught.value.problems) == [
        "blocks.1.2.norm1.bias and blocks.0.2.norm1.bias are both blocks.2.norm1.bias"
    ]
    local = {key.replace("blocks.1.2.", "blocks.1.0."): value for key, value in chunked(state, 2).items()}
    with pytest.raises(MappingError, match=r"blocks.0.0.norm1.bias and blocks.1.0.norm1.bias are both"):
        api.plan(saved(local, tmp_path / "x.pth"))


class ShardedTensor:
    """The class of FSDP's flat parameters, which can only be loaded with a process group."""


@pytest.mark.parametrize("value", [torch.ones(1000), ShardedTensor()])
def test_fsdp_shards_are_refused_with_an_alternative(tmp_path: Path, value: object) -> None:
    long = "_fsdp_wrapped_module." * 6
    flat = {"_flat_param": value, f"blocks.0.{long}_flat_param": value}
    source = saved({"model": flat}, tmp_path / "x.pth")
    message = r"FSDP sharded \(model\._flat_param\)\. .*teacher_checkpoint.pth.*FULL_STATE_DICT"
    with pytest.raises(MappingError, match=message):
        api.plan(source)


@pytest.mark.parametrize("wrap", ["", "state_dict."])
def test_depth_and_segmentation_heads_are_refused_with_the_reason(tmp_path: Path, wrap: str) -> None:
    head = prefixed({"decode_head.conv_depth.weight": torch.ones(1, 4, 1, 1)}, wrap)
    with pytest.raises(MappingError, match="a head for depth or segmentation, which no transformers class has"):
        api.plan(saved(head, tmp_path / "x.pth"))
    state, _ = make_states(tiny())
    both = {**prefixed(state, f"{wrap}backbone."), **head}
    with pytest.raises(MappingError, match="a head for depth or segmentation") as caught:
        api.plan(saved(both, tmp_path / "y.pth"))
    assert f"--select {wrap}backbone" in str(caught.value)
    assert api.plan(tmp_path / "y.pth", select=f"{wrap}backbone").skipped[0].tensors == 1


def test_head_over_four_layers_is_refused_with_the_reason(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved(state, tmp_path / "x.pth")
    head = saved({"weight": torch.ones(3, 5 * 128), "bias": torch.ones(3)}, tmp_path / "head.pth")
    with pytest.raises(MappingError, match="the head reads 4 layers, but transformers"):
        api.plan(source, head=head)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_constant_tensors_have_the_dtype_of_the_others(tmp_path: Path, stored: torch.dtype) -> None:
    state, _ = make_states(replace(tiny(registers=4), has_layer_scale=False, has_mask_token=False))
    source = saved({name: value.to(stored) for name, value in state.items()}, tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", max_shard_size="100KB")
    with streamconv.open_checkpoint(tmp_path / "out") as output:
        ones = output["encoder.layer.2.layer_scale2.lambda1"]
        assert bytes(read_bytes(ones)) == torch.ones(128, dtype=stored).view(torch.uint8).numpy().tobytes()
        assert not any(read_bytes(output["embeddings.mask_token"]))


@pytest.mark.parametrize(
    "missing",
    ["blocks.1.ls2.gamma [128]", "blocks.2.attn.qkv.bias [384]", "blocks.0.attn.proj.bias [128]",
     "blocks.1.mlp.fc1.bias [512]", "norm.bias [128]", "blocks.0.norm1.bias [128]"],
)  # fmt: skip
def test_parts_that_only_some_blocks_lack_are_reported_as_missing(tmp_path: Path, missing: str) -> None:
    state, _ = make_states(tiny())
    del state[missing.split()[0]]
    with pytest.raises(MappingError) as caught:
        api.plan(saved(state, tmp_path / "x.pth"))
    assert list(caught.value.problems) == [f"missing: {missing}"]


def test_bias_of_one_of_two_feed_forward_layers_is_reported_as_missing(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved({key: value for key, value in state.items() if not key.endswith("fc2.bias")}, tmp_path / "x.pth")
    with pytest.raises(MappingError) as caught:
        api.plan(source)
    assert list(caught.value.problems) == [f"missing: blocks.{i}.mlp.fc2.bias [128]" for i in range(3)]


def test_missing_biases_are_written_as_zeros(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    endings = ("attn.proj.bias", "fc1.bias", "fc2.bias", "patch_embed.proj.bias")
    lacking = {key: value for key, value in state.items() if not key.endswith(endings)}
    done = api.convert(saved(lacking, tmp_path / "x.pth"), tmp_path / "out")
    zeros = {key: torch.zeros_like(value) if key.endswith(endings) else value for key, value in state.items()}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(zeros, tmp_path / "theirs.safetensors")
    assert len(done.plan.filled) == 3 * 3 + 1
    assert {*done.plan.filled.values()} == {0.0}
    message = "the source has no bias in attn.proj, mlp, patch_embed.proj: zeros are written, which have no effect"
    assert message in done.plan.notes


def test_converted_model_without_a_bias_is_incomplete(tmp_path: Path) -> None:
    """transformers' classes have every bias, so that a folder without one is damaged."""
    folder = api.convert(saved(make_states(tiny())[0], tmp_path / "x.pth"), tmp_path / "out").output
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = "embeddings.patch_embeddings.projection.bias"
    del tensors[name]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MappingError) as caught:
        api.plan(folder)
    assert list(caught.value.problems) == [f"missing: {name} [128]"]


@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_ibots_masked_embed_is_the_mask_token(tmp_path: Path, prefix: str) -> None:
    state, _ = make_states(tiny())
    named = {"masked_embed" if key == "mask_token" else key: value for key, value in state.items()}
    done = api.convert(saved(prefixed(named, prefix), tmp_path / "x.pth"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    assert done.plan.config["use_mask_token"] is True
    assert f"{prefix}masked_embed" in {move.source for move in done.plan.mapping}
    with pytest.raises(MappingError, match=r"masked_embed \[1, 128\]"):
        api.plan(saved({**state, "masked_embed": state["mask_token"]}, tmp_path / "both.pth"))


def test_an_empty_tensor_of_registers_is_skipped(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved(prefixed({**state, "register_tokens": torch.ones(1, 0, 128)}, "model."), tmp_path / "x.pth")
    done = api.convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    assert [str(each) for each in done.plan.skipped] == [
        "model.register_tokens (1 tensor, 0 bytes): it is empty: the model has no registers"
    ]
    assert done.plan.architecture == "Dinov2Model"


def test_tensor_of_an_unreadable_class_is_named(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    state["norm.bias"] = state["norm.bias"].to_sparse()
    with pytest.raises(MappingError) as caught:
        api.plan(saved({"model": state}, tmp_path / "x.pth"))
    assert list(caught.value.problems) == ["model.norm.bias is a sparse tensor"]
    assert "Save tensor.to_dense() for each" in str(caught.value)


# What a model may lack, so that one that is not read must not count as missing.
OPTIONAL = ("attn.qkv.bias", "attn.proj.bias", "ls1.gamma", "patch_embed.proj.bias", "mask_token")


@pytest.mark.parametrize("is_converted", [False, True])
@pytest.mark.parametrize("part", OPTIONAL)
def test_unreadable_tensor_is_not_taken_for_a_missing_one(tmp_path: Path, part: str, is_converted: bool) -> None:
    state, _ = make_states(tiny(layers=1, registers=4))
    is_part = {key: part in key for key in state}
    unread = {key: value.to_sparse() if is_part[key] else value for key, value in state.items()}
    arrays = {key: value.numpy() if is_part[key] else value for key, value in state.items()}
    if is_converted:
        names = {key: [*original_mapping({key: value})] for key, value in state.items()}
        unread = {name: unread[key] for key in state for name in names[key]}
        arrays = {name: arrays[key] for key in state for name in names[key]}
    with pytest.raises(MappingError, match=r"holds sparse tensors\. Save tensor\.to_dense\(\)"):
        api.plan(saved({"model": unread}, tmp_path / "x.pth"))
    with pytest.raises(MappingError, match=r"model\..* is a numpy\..*, which is not read"):
        api.plan(saved({"model": arrays}, tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("part", "value"),
    [*zip([*OPTIONAL, "register_tokens"], [[0.5] * 128, 0.5, (1.0,), [], torch.uint16, True], strict=True)],
)
def test_python_value_is_not_taken_for_a_missing_tensor(tmp_path: Path, part: str, value: object) -> None:
    state, _ = make_states(tiny(layers=1, registers=4))
    names = [key for key in state if part in key]
    source = saved({"model": {**state, **dict.fromkeys(names, value)}, "epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(MappingError) as caught:
        api.plan(source)
    kind = "object" if value is torch.uint16 else type(value).__name__
    assert {f"model.{name} is a Python {kind}, which is not read" for name in names} <= {*caught.value.problems}


def test_none_states_that_there_is_no_tensor(tmp_path: Path) -> None:
    state, _ = make_states(tiny(layers=1))
    bias = "patch_embed.proj.bias"
    lacking = {key: value for key, value in state.items() if key != bias}
    assert api.plan(saved({**state, bias: None}, tmp_path / "x.pth")).filled == (
        api.plan(saved(lacking, tmp_path / "y.pth")).filled
    )


def test_settings_with_names_of_other_architectures_do_not_matter(tmp_path: Path) -> None:
    settings = {"roi_heads": 2, "lm_head": [1], "cls_token": True, "blocks": {"0": {"norm1": {"weight": 1}}}}
    assert api.plan(saved({"model": make_states(tiny())[0], "args": settings, **settings}, tmp_path / "x.pth"))


def test_unreadable_tensor_inside_the_backbone_is_part_of_the_computation(tmp_path: Path) -> None:
    """A tensor of an unknown name may be an adapter; objects of other classes are settings."""
    state, _ = make_states(tiny())
    adapter = {"blocks.0.attn.lora": torch.ones(1).to_sparse(), "blocks.0.attn.config": argparse.Namespace()}
    with pytest.raises(MappingError) as caught:
        api.plan(saved({**state, **adapter}, tmp_path / "x.pth"))
    assert list(caught.value.problems) == ["blocks.0.attn.lora is a sparse tensor"]


def test_unreadable_head_beside_a_backbone_is_not_left_out_silently(tmp_path: Path) -> None:
    state, head = make_states(tiny(classes=3))
    sparse = {f"linear_head.{key}": value.to_sparse() for key, value in head.items()}
    arrays = {f"linear_head.{key}": value.numpy() for key, value in head.items()}
    source = saved({"model": {**state, **sparse}}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"model\.linear_head\.weight is a sparse tensor"):
        api.plan(source)
    assert api.plan(source, select="model").architecture == "Dinov2Model"
    source = saved({"model": {**state, **arrays}}, tmp_path / "y.pth")
    with pytest.raises(MappingError, match=r"model\.linear_head\.weight is a numpy.*, which is not read"):
        api.plan(source)
    assert api.plan(source, select="model").architecture == "Dinov2Model"


def test_unreadable_objects_outside_the_backbone_are_ignored(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    others = {"norm.bias": argparse.Namespace(), "model.args": argparse.Namespace()}
    assert api.plan(saved({"model": state, **others}, tmp_path / "x.pth")).skipped == ()


def test_equal_shapes_do_not_make_a_published_model(tmp_path: Path) -> None:
    small, _ = make_states(tiny(layers=12, hidden=384))
    small["pos_embed"] = torch.zeros(1, 1370, 384)
    own = saved(small, tmp_path / "mine.pth")
    plan = api.plan(own)
    assert (plan.title, plan.is_published, plan.assumed_heads) == ("a model shaped like dinov2_vits14", False, 6)
    assert any("(224 x 224 pixels), since tensors do not show how images were prepared" in n for n in plan.notes)
    for words in (("plan",), ("convert", "-o", "out")):
        shown = json.loads(run(words[0], "mine.pth", *words[1:], "--json", cwd=tmp_path).stdout)
        assert (shown["model"], shown["shaped_like"]) == (None, "dinov2_vits14")
    done = run("convert", "mine.pth", "-o", "again", cwd=tmp_path)
    assert done.stdout.startswith("a model shaped like dinov2_vits14: converted into again")
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_text("utf-8"))
    assert (manifest["model"], manifest["shaped_like"]) == (None, "dinov2_vits14")
    named = api.plan(own.rename(tmp_path / "dinov2_vits14_pretrain.pth"))
    assert (named.title, named.is_published, named.assumed_heads) == ("dinov2_vits14", True, None)


def test_incomplete_converted_model_is_refused(tmp_path: Path) -> None:
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    folder = api.convert(source, tmp_path / "out").output
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.attention.attention.key.weight"]
    tensors["more"] = torch.ones(3)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MappingError) as caught:
        api.plan(folder)
    assert sorted(caught.value.problems) == [
        "missing: blocks.1.attn.qkv.weight [384, 128]",
        "unexpected: encoder.layer.1.attention.attention.query.weight [128, 128]",
        "unexpected: encoder.layer.1.attention.attention.value.weight [128, 128]",
        "unexpected: more [3]",
    ]
    done = run("plan", "out", cwd=tmp_path)
    assert done.returncode == 3
    safetensors.torch.save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(MappingError, match="is not a checkpoint of a model that streamconv knows"):
        api.plan(folder)


def test_config_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    folder = api.convert(saved(make_states(tiny())[0], tmp_path / "x.pth"), tmp_path / "out").output
    config = json.loads((folder / "config.json").read_bytes())
    changed = {**config, "hidden_size": 256, "hidden_act": "relu", "drop_path_rate": 0.1, "mine": 3}
    (folder / "config.json").write_text(json.dumps(changed))
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(MappingError) as caught:
            api.plan(source)
        assert sorted(caught.value.problems) == [
            "its config.json sets hidden_act to 'relu', but dinov2 models have 'gelu'",
            "its config.json sets hidden_size to 256, but the tensors show 128",
        ]


def test_folder_is_not_converted_into_itself(tmp_path: Path) -> None:
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    folder = api.convert(source, tmp_path / "out").output
    before = contents(folder)
    with pytest.raises((UsageError, OutputError)):
        api.convert(folder, folder, dtype="bfloat16")
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("swiglu", "registers", "classes", "limit"),
    [(False, 0, None, "5GB"), (False, 4, 5, "200KB"), (True, 0, 5, "200KB"), (True, 4, None, "200KB"),
     (True, 4, 5, "5GB")],
)  # fmt: skip
def test_converted_folder_can_be_converted_again(
    tmp_path: Path, swiglu: bool, registers: int, classes: int | None, limit: str
) -> None:
    """Casting and resharding it gives the same as converting the original that way; the labels are kept."""
    backbone, head = make_states(tiny(swiglu, classes, registers=registers))
    source = saved(backbone, tmp_path / "x.pth")
    given: dict[str, Any] = {}
    if classes:
        (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\n")
        given = {"head": saved(head, tmp_path / "h.pth"), "labels": tmp_path / "labels.txt"}
    api.convert(source, tmp_path / "first", max_shard_size=limit, **given)
    done = api.convert(tmp_path / "first", tmp_path / "second", dtype="bfloat16", max_shard_size="150KB")
    api.convert(source, tmp_path / "at once", dtype="bfloat16", max_shard_size="150KB", **given)
    ours, theirs = contents(tmp_path / "second"), contents(tmp_path / "at once")
    assert done.labels_from == ("the source's config.json" if classes else None)
    del ours["streamconv.json"], theirs["streamconv.json"]
    assert ours == theirs
