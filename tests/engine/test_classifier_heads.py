"""Classifiers whose head is in the backbone's file, or in a larger file of heads."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import MappingError, OutputError, UsageError
from tests import api
from tests.checkpoints import State, make_states, original_mapping, prefixed, saved
from tests.support import model_files, run, tiny

CLASSIFIER = tiny(classes=5)
MISFIT = "the head reads 128 channels, such as those of the CLS token alone, but transformers' classes read 256"


@pytest.fixture(scope="module")
def states() -> tuple[State, State]:
    return make_states(CLASSIFIER)


def expected(backbone: State, head: State) -> State:
    """Return the tensors of transformers' classifier, by a mapping that is independent of streamconv's rules."""
    return original_mapping(backbone, "dinov2.") | prefixed(head, "classifier.")


def is_classifier(folder: Path, backbone: State, head: State) -> bool:
    written = safetensors.torch.load_file(folder / "model.safetensors")
    wanted = expected(backbone, head)
    has_weights = written.keys() == wanted.keys() and all(torch.equal(written[name], wanted[name]) for name in wanted)
    return has_weights and architectures(folder) == ["Dinov2ForImageClassification"]


def is_backbone(folder: Path, backbone: State) -> bool:
    written = safetensors.torch.load_file(folder / "model.safetensors")
    return written.keys() == original_mapping(backbone).keys() and architectures(folder) == ["Dinov2Model"]


def architectures(folder: Path) -> list[str]:
    found: list[str] = json.loads((folder / "config.json").read_text())["architectures"]
    return found


@pytest.mark.parametrize(
    ("prefix", "start", "is_assumed"),
    [("backbone.", "linear_head.", False), ("", "head.", True), ("", "linear_head.", False),
     ("model.backbone.", "model.classifier.", True), ("module.backbone.", "module.linear_head.", False),
     ("net.", "fc.", True), ("net.", "net.head.", True)],
)  # fmt: skip
def test_head_in_the_same_file_makes_a_classifier(
    tmp_path: Path, states: tuple[State, State], prefix: str, start: str, is_assumed: bool
) -> None:
    backbone, head = states
    source = saved(prefixed(backbone, prefix) | prefixed(head, start), tmp_path / "x.pth")
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    done = api.convert(source, tmp_path / "out", labels=tmp_path / "labels.txt")
    assert is_classifier(tmp_path / "out", backbone, head)
    assert done.plan.config["id2label"] == dict(enumerate("abcde"))
    assert {move.source for move in done.plan.mapping} >= {f"{start}weight", f"{start}bias"}
    assumed = f"{start}bias and {start}weight are assumed to be a head that reads the CLS token and the mean of the"
    assert [note.startswith(assumed) for note in (*done.plan.notes, *done.plan.unproved)].count(True) == 2 * is_assumed
    assert done.plan.skipped == ()
    alone = api.convert(source, tmp_path / "alone", select=prefix)
    assert is_backbone(tmp_path / "alone", backbone)
    assert [(each.start, each.reason) for each in alone.plan.skipped] == [(start, "not selected")]


def test_head_in_the_same_file_gives_the_files_that_a_head_of_its_own_gives(
    tmp_path: Path, states: tuple[State, State]
) -> None:
    backbone, head = states
    api.convert(saved(backbone, tmp_path / "x.pth"), tmp_path / "two", head=saved(head, tmp_path / "h.pth"))
    whole = saved(prefixed(backbone, "backbone.") | prefixed(head, "linear_head."), tmp_path / "lc.pth")
    api.convert(whole, tmp_path / "one")
    assert model_files(tmp_path / "one") == model_files(tmp_path / "two")
    streamconv.revert(tmp_path / "one", tmp_path / "back.pth", head=tmp_path / "back_head.pth")
    assert all(torch.equal(value, head[key]) for key, value in torch.load(tmp_path / "back_head.pth").items())
    assert torch.load(tmp_path / "back.pth").keys() == backbone.keys()


@pytest.mark.parametrize(("prefix", "is_chosen"), [("", False), ("model.", False), ("base_model.model.", True)])
def test_converted_classifier_is_found_under_a_prefix(
    tmp_path: Path, states: tuple[State, State], prefix: str, is_chosen: bool
) -> None:
    named = expected(*states)
    source = tmp_path / "x.safetensors"
    safetensors.torch.save_file(prefixed(named, prefix), source)
    api.convert(source, tmp_path / "out")
    assert is_classifier(tmp_path / "out", *states)
    api.convert(source, tmp_path / "alone", select=f"{prefix}dinov2" if is_chosen else "dinov2")
    assert is_backbone(tmp_path / "alone", states[0])


def test_head_that_peft_trained_is_the_head(tmp_path: Path, states: tuple[State, State]) -> None:
    backbone, head = states
    named = prefixed(original_mapping(backbone), "dinov2.") | prefixed(head, "classifier.modules_to_save.default.")
    named |= prefixed({key: torch.zeros_like(value) for key, value in head.items()}, "classifier.original_module.")
    api.convert(saved(prefixed(named, "base_model.model."), tmp_path / "x.pth"), tmp_path / "out")
    assert is_classifier(tmp_path / "out", backbone, head)


@pytest.mark.parametrize(
    ("weight", "bias", "reason"),
    [((5, 128), (5,), MISFIT), ((5, 640), (5,), "the head reads 4 layers"), ((5, 256), (4,), ""),
     ((5, 256, 1, 1), (5,), ""), ((256, 5), (5,), "")],
)  # fmt: skip
def test_head_of_another_shape_is_refused_and_can_be_left_out(
    tmp_path: Path, states: tuple[State, State], weight: tuple[int, ...], bias: tuple[int, ...], reason: str
) -> None:
    backbone, _ = states
    head = {"head.weight": torch.ones(weight), "head.bias": torch.ones(bias)}
    source = saved(prefixed(backbone, "backbone.") | head, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"more than a backbone\. To skip .* --select backbone:") as caught:
        api.plan(source)
    assert caught.value.problems[0].startswith(f"head.weight {list(weight)}{f': {reason}' if reason else ''}")
    assert api.plan(source, select="backbone").architecture == "Dinov2Model"
    with pytest.raises(MappingError, match=r"wrong shape: head\.(weight|bias) is"):
        api.plan(source, head_select="head")


def test_several_heads_in_the_same_file_require_a_choice(tmp_path: Path, states: tuple[State, State]) -> None:
    backbone, head = states
    other = {key: value + 1 for key, value in head.items()}
    named = prefixed(backbone, "backbone.") | prefixed(head, "head.") | prefixed(other, "linear_head.")
    source = saved(named, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"several heads\. Choose one with --head-select PREFIX:") as caught:
        api.plan(source)
    assert list(caught.value.problems) == ["head [5, 256] and [5]", "linear_head [5, 256] and [5]"]
    with pytest.raises(MappingError, match=r"use --select backbone and --head-select linear_head:"):
        api.plan(source, head_select="linear_head")
    api.convert(source, tmp_path / "out", select="backbone", head_select="linear_head")
    assert is_classifier(tmp_path / "out", backbone, other)
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_text())
    assert (manifest["select"], manifest["head_select"]) == ("backbone", "linear_head")
    with pytest.raises(OutputError, match=r"its plan .* differs"):
        api.convert(source, tmp_path / "out", select="backbone", head_select="head")


def eval_linear(head: State) -> dict[str, Any]:
    """Return a checkpoint as DINOv2's linear evaluation writes it: a grid of heads, and the state of training."""
    heads: State = {}
    for blocks in (1, 4):
        for pool in (False, True):
            width = 128 * (blocks + pool)
            for i, rate in enumerate(("0_00001", "0_00100")):
                start = f"classifiers_dict.classifier_{blocks}_blocks_avgpool_{pool}_lr_{rate}.linear."
                fits = (blocks, pool) == (1, True)
                weight = head["weight"] + i if fits else torch.ones(5, width)
                heads |= {f"{start}weight": weight, f"{start}bias": head["bias"]}
    return {"model": heads, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}, "iteration": 12499}


def test_head_is_chosen_in_a_larger_file(tmp_path: Path, states: tuple[State, State]) -> None:
    backbone, head = states
    source = saved(backbone, tmp_path / "x.pth")
    heads = saved(eval_linear(head), tmp_path / "heads.pth")
    fitting = "model.classifiers_dict.classifier_1_blocks_avgpool_True_lr_"
    with pytest.raises(MappingError, match=r"heads\.pth holds several heads\. Choose one") as caught:
        api.plan(source, head=heads)
    assert list(caught.value.problems) == [f"{fitting}{lr}.linear [5, 256] and [5]" for lr in ("0_00001", "0_00100")]
    for i, (lr, select) in enumerate((("0_00001", f"{fitting}0_00001"), ("0_00100", f"{fitting}0_00100.linear."))):
        api.convert(source, tmp_path / lr, head=heads, head_select=select)
        assert is_classifier(tmp_path / lr, backbone, {"weight": head["weight"] + i, "bias": head["bias"]})
    with pytest.raises(UsageError, match=rf"Use --head-select {fitting}0_00001.linear or --head-select"):
        api.plan(source, head=heads, head_select="model")
    with pytest.raises(UsageError, match=r"does not have one head under teacher\. Use --head-select"):
        api.plan(source, head=heads, head_select="teacher")
    four = "model.classifiers_dict.classifier_4_blocks_avgpool_True_lr_0_00100.linear"
    with pytest.raises(MappingError, match="the head reads 4 layers, but transformers"):
        api.plan(source, head=heads, head_select=four)


def test_head_of_a_classifiers_file_can_be_used_with_another_backbone(
    tmp_path: Path, states: tuple[State, State]
) -> None:
    backbone, head = states
    other, _ = make_states(tiny(), seed=1)
    whole = saved(prefixed(other, "backbone.") | prefixed(head, "linear_head."), tmp_path / "lc.pth")
    source = saved(backbone, tmp_path / "x.pth")
    made = api.convert(source, tmp_path / "out", head=whole, head_select="linear_head")
    assert not any("head's outputs" in each for each in made.plan.unproved)  # the backbone beside it is no part of it
    assert is_classifier(tmp_path / "out", backbone, head)
    with pytest.raises(UsageError, match=r"already has its head\. Omit --head, or .* with --select backbone\."):
        api.plan(whole, head=whole, head_select="linear_head")
    api.convert(whole, tmp_path / "again", head=whole, head_select="linear_head", select="backbone")
    assert is_classifier(tmp_path / "again", other, head)


def test_head_under_any_prefix_in_a_file_of_its_own(tmp_path: Path, states: tuple[State, State]) -> None:
    backbone, head = states
    source = saved(backbone, tmp_path / "x.pth")
    for prefix in ("linear_head.", "module.classifier.", "0."):
        api.convert(source, tmp_path / prefix, head=saved(prefixed(head, prefix), tmp_path / "h.pth"))
        assert is_classifier(tmp_path / prefix, backbone, head)


def test_head_select_needs_a_head(tmp_path: Path, states: tuple[State, State]) -> None:
    source = saved(prefixed(states[0], "backbone."), tmp_path / "x.pth")
    done = run("plan", source, "--head-select", "linear_head", cwd=tmp_path)
    assert done.returncode == 2
    assert "x.pth holds no head, so --head-select linear_head finds none. Give its file with --head." in done.stderr
    with pytest.raises(UsageError, match="head_select must be a string or None, not 3"):
        api.plan(source, head_select=3)


@pytest.mark.parametrize("in_same_file", [False, True])
@pytest.mark.parametrize(
    ("beside", "place", "expected"),
    [
        ({"0.weight": (256,), "0.bias": (256,), "0.running_mean": (256,)}, "1.", "head.0."),  # a batch norm
        ({"0.weight": (256, 256), "0.bias": (256,)}, "2.", "head.0."),  # an MLP
        ({"hidden.weight": (256, 256), "hidden.bias": (256,)}, "out.", "head.hidden."),
        ({"norm.weight": (5,), "norm.bias": (5,)}, "out.", "head.norm."),  # after it
        ({"1.weight": (5, 5), "1.bias": (5,)}, "0.", "head.1."),  # a calibration
        ({"b.weight": (5, 640), "b.bias": (5,), "c.weight": (9, 256), "c.bias": (9,)}, "a.", ""),  # other heads
    ],
)
def test_weights_left_out_beside_a_chosen_head_are_unproved(
    tmp_path: Path, states: tuple[State, State], beside: dict[str, tuple[int, ...]], place: str, expected: str,
    in_same_file: bool,
) -> None:  # fmt: skip
    backbone, head = states
    names = {f"head.{key}": torch.ones(shape) for key, shape in beside.items()} | prefixed(head, f"head.{place}")
    alone = saved(prefixed(backbone, "backbone."), tmp_path / "x.pth")
    whole = prefixed(backbone, "backbone.") | names | {"optimizer.state.0.exp_avg": torch.ones(3)}
    both = saved(whole, tmp_path / "both.pth")
    options = {"head_select": f"head.{place}", "select": "backbone"}
    plan = api.plan(both, **options) if in_same_file else api.plan(alone, head=both, **options)
    said = f"{expected}: left out, and assumed not to change the head's outputs"
    assert [each for each in plan.unproved if "head's outputs" in each] == ([said] if expected else [])
