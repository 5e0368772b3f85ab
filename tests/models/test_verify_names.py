"""Verification of backbones and heads that are found among other names: the original model gets the right weights."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification, Dinov2Model

import streamconv
from tests import api
from tests.checkpoints import State, make_states, original_mapping, prefixed, saved
from tests.file_server import FileServer
from tests.support import tiny


@pytest.fixture(scope="module")
def states() -> tuple[State, State]:
    return make_states(tiny(classes=5))


def require_exact(folder: Path, source: Path | str, **options: Any) -> streamconv.Verification:
    found = api.verify(folder, source, device="cpu", **options)
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").numbers["largest"] == 0.0
    return found


@pytest.mark.parametrize(("prefix", "start"), [("backbone.", "linear_head."), ("", "head.")])
def test_head_in_the_same_file_is_verified(
    tmp_path: Path, states: tuple[State, State], prefix: str, start: str
) -> None:
    backbone, head = states
    source = saved(prefixed(backbone, prefix) | prefixed(head, start), tmp_path / "x.pth")
    api.convert(source, tmp_path / "out")
    found = require_exact(tmp_path / "out", source)
    assert "logits" in found.check("parity").numbers["differences"]
    assert ("are assumed to be a head" in found.check("parity").not_checked) is (start == "head.")
    wrong = {**head, "bias": head["bias"] + 1}
    saved(prefixed(backbone, prefix) | prefixed(wrong, start), source)
    found = api.verify(tmp_path / "out", source, device="cpu")
    assert [found.check(name).passed for name in ("bytes", "parity")] == [False, False]


def test_head_of_a_larger_file_is_verified(tmp_path: Path, states: tuple[State, State]) -> None:
    backbone, head = states
    source = saved(backbone, tmp_path / "x.pth")
    other = {key: value + 1 for key, value in head.items()}
    heads = saved({"model": prefixed(other, "a.linear.") | prefixed(head, "b.linear.")}, tmp_path / "h.pth")
    api.convert(source, tmp_path / "out", head=heads, head_select="b.linear")
    require_exact(tmp_path / "out", source, head=heads)  # the manifest records which one
    found = api.verify(tmp_path / "out", source, head=heads, head_select="a.linear", device="cpu")
    assert [found.check(name).passed for name in ("bytes", "parity")] == [False, False]


def test_streamed_head_in_the_same_file_is_verified(
    tmp_path: Path, states: tuple[State, State], server: FileServer
) -> None:
    backbone, head = states
    saved(prefixed(backbone, "backbone.") | prefixed(head, "linear_head."), server.folder / "x.pth")
    api.convert(f"{server.url}/x.pth", tmp_path / "out", stream=True)
    found = require_exact(tmp_path / "out", f"{server.url}/x.pth", stream=True)
    assert "logits" in found.check("parity").numbers["differences"]


def test_wrapped_blocks_are_verified(tmp_path: Path, states: tuple[State, State]) -> None:
    backbone, _ = states
    named = {key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): value for key, value in backbone.items()}
    source = saved({"teacher": prefixed(named, "backbone._orig_mod.")}, tmp_path / "x.pth")
    api.convert(source, tmp_path / "out")
    require_exact(tmp_path / "out", source)
    key = "blocks.1._checkpoint_wrapped_module.attn.qkv.weight"
    named[key] = named[key].flip(0)
    saved({"teacher": prefixed(named, "backbone._orig_mod.")}, source)
    assert api.verify(tmp_path / "out", source, device="cpu").check("parity").passed is False


@pytest.mark.transformers
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_transformers_backbone_inside_another_model_is_verified(tmp_path: Path, suffix: str) -> None:
    config = Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    torch.manual_seed(0)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    state = safetensors.torch.load_file(tmp_path / "theirs" / "model.safetensors")
    whole = prefixed(state, "model.vision_tower.") | {"model.language_model.norm.weight": torch.ones(8)}
    source = tmp_path / f"x{suffix}"
    safetensors.torch.save_file(whole, source) if suffix == ".safetensors" else torch.save(whole, source)
    api.convert(source, tmp_path / "out", select="vision_tower")
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    require_exact(tmp_path / "out", source)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        ours = Dinov2Model.from_pretrained(tmp_path / "out").eval()(pixels).last_hidden_state
        torch.testing.assert_close(ours, model(pixels).last_hidden_state)


@pytest.mark.transformers
def test_transformers_classifier_below_a_prefix_keeps_its_logits(tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, num_labels=5
    )
    torch.manual_seed(0)
    model = Dinov2ForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    state = safetensors.torch.load_file(tmp_path / "theirs" / "model.safetensors")
    source = saved({"state_dict": prefixed(state, "model.")}, tmp_path / "x.ckpt")
    api.convert(source, tmp_path / "out")
    require_exact(tmp_path / "out", source)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        ours = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()(pixels).logits
        torch.testing.assert_close(ours, model(pixels).logits)  # bytes at another address may round otherwise


def test_selected_backbone_of_a_converted_segmentation_model_is_verified(
    tmp_path: Path, states: tuple[State, State]
) -> None:
    """Tutorials put a convolution, under the classifier's name, on Dinov2Model."""
    named = prefixed(original_mapping(states[0]), "dinov2.")
    named |= {"classifier.classifier.weight": torch.ones(5, 128, 1, 1), "classifier.classifier.bias": torch.ones(5)}
    source = saved(named, tmp_path / "x.pth")
    with pytest.raises(streamconv.MappingError, match=r"To skip other tensors, use --select dinov2:"):
        api.plan(source)
    api.convert(source, tmp_path / "out", select="dinov2")
    require_exact(tmp_path / "out", source)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("classes", [0, 3])
def test_state_dict_of_transformers_in_memory_is_the_model_that_save_pretrained_writes(
    tmp_path: Path, classes: int, prefix: str
) -> None:
    """Some of its names are not those of files, if transformers 5 wrote it."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    kind = Dinov2ForImageClassification if classes else Dinov2Model
    model = kind(Dinov2Config(**sizes, num_labels=classes or 2))
    model.save_pretrained(tmp_path / "saved")
    source = saved(prefixed(model.state_dict(), prefix), tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", num_heads=2)
    written, expected = (
        safetensors.torch.load_file(tmp_path / each / "model.safetensors") for each in ("out", "saved")
    )
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    require_exact(tmp_path / "out", source, num_heads=2)
