"""Names with the parts that torch and PEFT insert: they are dropped inside a backbone, and shown in messages."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp._common_utils import clean_tensor_name

import streamconv
from streamconv import MappingError, UsageError
from streamconv.verification.originals.dinov2 import build
from tests import api
from tests.checkpoints import HEADS, State, chunked, make_states, prefixed, saved, wanted
from tests.support import model_files, run, tiny


def inside(part: str, state: State) -> State:
    """Insert a part after each block's number, as wrapping the blocks does."""
    named = {}
    for key, value in state.items():
        parts = key.split(".")
        named[".".join([*parts[:2], part, *parts[2:]] if parts[0] == "blocks" else parts)] = value
    return named


def require_same(source: Path, state: State, tmp_path: Path, **options: str) -> streamconv.Plan:
    """Require that ``source`` is converted like ``state``, and that the plan shows the names of the file."""
    done = api.convert(source, tmp_path / "out", **options)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted(state, tmp_path / "theirs.safetensors")
    return done.plan


def wrapped_model(wrap: Callable[[nn.Module], nn.Module]) -> State:
    model = build(tiny())
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrap(block)
    model.norm = wrap(model.norm)  # type: ignore[assignment]
    return dict(model.state_dict())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, checkpoint_wrapper])
def test_modules_that_torch_wrapped_are_converted(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    named = wrapped_model(wrap)
    expected = {
        clean_tensor_name(key).replace("_orig_mod.", "").replace("module.", ""): value for key, value in named.items()
    }
    plan = require_same(saved(named, tmp_path / "x.pth"), expected, tmp_path)
    assert {move.source for move in plan.mapping} == {*named}


@pytest.mark.parametrize("prefix", ["", "module.", "teacher.backbone._fsdp_wrapped_module.", "_forward_module.model."])
@pytest.mark.parametrize(
    "part", ["_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module", "module",
             "_fsdp_wrapped_module._checkpoint_wrapped_module"],
)  # fmt: skip
def test_wrapped_blocks_are_converted_under_any_prefix(tmp_path: Path, prefix: str, part: str) -> None:
    state, _ = make_states(tiny())
    named = prefixed(inside(part, state), prefix)
    plan = require_same(saved(named, tmp_path / "x.pth"), state, tmp_path)
    assert {move.source for move in plan.mapping} == {*named}


def test_block_chunks_of_a_wrapped_model_are_restored(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    plan = require_same(saved(inside("_orig_mod", chunked(state, 1)), tmp_path / "x.pth"), state, tmp_path)
    assert plan.block_chunks
    streamconv.revert(tmp_path / "out", tmp_path / "back.pth")
    assert torch.load(tmp_path / "back.pth").keys() == chunked(state, 1).keys()


def test_two_names_that_differ_in_wrappers_only_are_refused(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    twice = {**state, "blocks.0.module.norm1.bias": torch.ones(128)}
    with pytest.raises(MappingError) as caught:
        api.plan(saved(twice, tmp_path / "x.pth"))
    assert list(caught.value.problems) == [
        "blocks.0.norm1.bias and blocks.0.module.norm1.bias are both blocks.0.norm1.bias"
    ]


def test_two_models_that_differ_in_a_wrapper_stay_two(tmp_path: Path) -> None:
    state, other = (make_states(tiny(), seed)[0] for seed in (0, 1))
    source = saved({**state, "module": other}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match="several backbones"):
        api.plan(source)
    require_same(source, other, tmp_path, select="module")


def test_messages_show_the_names_of_the_file(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    state["blocks.1.norm1.bias"] = torch.ones(7)
    with pytest.raises(MappingError) as caught:
        api.plan(saved(inside("_orig_mod", state), tmp_path / "x.pth"))
    assert list(caught.value.problems) == ["wrong shape: blocks.1._orig_mod.norm1.bias is [7], not [128]"]


def test_prefix_is_selected_by_its_start_or_its_end(tmp_path: Path) -> None:
    """The original DINO saves a student in DistributedDataParallel and a teacher without it."""
    student, teacher = (make_states(tiny(), seed)[0] for seed in (0, 1))
    head: State = {"head.mlp.0.weight": torch.ones(3, 128), "head.last_layer.weight_g": torch.ones(9, 1)}
    whole = {
        "student": prefixed({**prefixed(student, "backbone."), **head}, "module."),
        "teacher": {**prefixed(teacher, "backbone."), **head},
        "epoch": 100,
    }
    source = saved(whole, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"several backbones\. .*, usually teacher\.backbone:"):
        api.plan(source)
    for i, (select, state) in enumerate(
        (("teacher", teacher), ("teacher.", teacher), ("student", student), ("student.backbone", student))
    ):
        (tmp_path / str(i)).mkdir()
        require_same(source, state, tmp_path / str(i), select=select)
    with pytest.raises(UsageError, match=r"Use --select student\.module\.backbone or --select teacher\.backbone\.$"):
        api.plan(source, select="backbone")


@pytest.mark.parametrize("key", ["state_dict.model.", "ema.", "ema_model.", "model_ema.", "state_dict_ema.",
                                 "module.encoder_q.", "online_encoder.net."])  # fmt: skip
def test_a_copy_beside_others_is_selected_by_the_names_of_well_known_trainers(tmp_path: Path, key: str) -> None:
    state, other = (make_states(tiny(), seed)[0] for seed in (0, 1))
    source = saved({**prefixed(state, key), **prefixed(other, "raw_model.")}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match="several backbones") as caught:
        api.plan(source)
    assert list(caught.value.problems) == [f"{key} 49 tensors", "raw_model. 49 tensors"]
    require_same(source, state, tmp_path, select=key.rstrip("."))


def test_merged_lora_is_converted_and_unmerged_lora_is_not(tmp_path: Path) -> None:
    """Some programs save the merged layers of a model with LoRA under PEFT's own names."""
    state, _ = make_states(tiny())
    named = {key.replace("attn.qkv.", "attn.qkv.base_layer."): value for key, value in state.items()}
    source = saved(prefixed(named, "base_model.model."), tmp_path / "x.pth")
    require_same(source, state, tmp_path)
    named["blocks.0.attn.qkv.lora_A.default.weight"] = torch.ones(8, 128)
    source = saved(prefixed(named, "base_model.model."), tmp_path / "y.pth")
    for select in (None, "base_model"):
        with pytest.raises(MappingError, match="LoRA"):
            api.plan(source, select=select)


def test_modules_that_peft_trained_replace_their_originals(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    named = {key.replace("norm.", "norm.modules_to_save.default.", key.startswith("norm.")): value
             for key, value in state.items()}  # fmt: skip
    named |= {f"norm.original_module.{key}": torch.zeros(128) for key in ("weight", "bias")}
    plan = require_same(saved(prefixed(named, "base_model.model."), tmp_path / "x.pth"), state, tmp_path)
    assert [(each.pattern, each.tensors, each.reason) for each in plan.skipped] == [
        ("base_model.model.norm.original_module.*", 2, "a module that PEFT replaces with a trained copy")
    ]


def test_wrapped_training_checkpoint_skips_its_heads(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    named = {
        **prefixed(inside("_fsdp_wrapped_module", state), "backbone._fsdp_wrapped_module."),
        **{key.replace("head.", "head._fsdp_wrapped_module.", 1): value for key, value in HEADS.items()},
    }
    plan = require_same(saved({"teacher": named}, tmp_path / "x.pth"), state, tmp_path)
    assert [each.start for each in plan.skipped] == ["teacher.dino_head.", "teacher.ibot_head."]


def test_wrapped_model_is_reverted_and_converted_again_to_the_same_files(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    require_same(saved(inside("module", state), tmp_path / "x.pth"), state, tmp_path)
    assert run("revert", "out", "-o", "back.pth", cwd=tmp_path).returncode == 0
    api.convert(tmp_path / "back.pth", tmp_path / "again")
    assert model_files(tmp_path / "again") == model_files(tmp_path / "out")
