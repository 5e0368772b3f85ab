"""Verification of DINOv3's ConvNeXt: a correct output passes, and faults are found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2
from transformers import AutoImageProcessor, DINOv3ConvNextConfig, DINOv3ConvNextModel

from streamconv.families.dinov3_convnext import FAMILY
from streamconv.verification.image import make_image
from tests import api
from tests.checkpoints import saved
from tests.convnext import TINY, convnext_state


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(convnext_state(), tmp_path / "x.pth")


@pytest.mark.transformers
def test_correct_conversion_passes_every_check(tmp_path: Path, source: Path) -> None:
    """The authors' norm over channels rounds otherwise than torch's, so float64 decides."""
    folder = api.convert(source, tmp_path / "out").output
    found = api.verify(folder, source, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    parity = found.check("parity").numbers
    assert [*parity["differences"]] == ["embeddings", *(f"layer {i}" for i in range(7)), "cls", "patches"]
    assert parity["tolerance"] == 1e-13
    assert 0 < parity["float32"]["largest"] < 1e-5
    assert found.conclusion.title == "Looks ok!"
    assert not found.conclusion.details


@pytest.mark.transformers
def test_image_processor_makes_the_pixels_of_the_authors_transform_before_they_are_rounded(
    tmp_path: Path, source: Path
) -> None:
    folder = api.convert(source, tmp_path / "out").output
    check = api.verify(folder, source, device="cpu", parity=False).check("preprocessing")
    load: Any = AutoImageProcessor.from_pretrained
    pixels = load(folder)(make_image(), return_tensors="pt")["pixel_values"][0]
    to_float, resize = v2.ToDtype(torch.float32, scale=True), v2.Resize((224, 224), antialias=True)
    normalize = v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    image = v2.functional.to_image(make_image())
    assert check.passed
    assert check.numbers["rounded"] == (pixels - normalize(to_float(resize(image)))).abs().max()
    assert (pixels - normalize(resize(to_float(image)))).abs().max() < 2e-6


FAULTS = {
    "stages.0.downsample_layers.1.bias": "embeddings",
    "stages.1.downsample_layers.0.weight": "layer 1",
    "stages.1.layers.1.gamma": "layer 2",
    "stages.2.layers.0.depthwise_conv.weight": "layer 3",
    "stages.3.layers.0.layer_norm.bias": "layer 6",
    "layer_norm.weight": "cls",
}


@pytest.mark.parametrize("key", FAULTS)
def test_wrong_tensor_fails_bytes_and_parity_where_it_is_used(tmp_path: Path, source: Path, key: str) -> None:
    path = api.convert(source, tmp_path / "out", image_size=64).output / "model.safetensors"
    state = load_file(path)
    state[key].view(-1)[0] += 1e-3
    save_file(state, path, metadata={"format": "pt"})
    found = api.verify(tmp_path / "out", source, device="cpu")
    assert [found.check(name).passed for name in ("bytes", "load", "parity")] == [False, True, False]
    assert found.check("parity").numbers["first"] == FAULTS[key]


def test_last_norm_is_compared_with_the_one_that_the_authors_code_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the two norms' values were not compared, parity would find the difference: torch loads norms.3 last."""
    family = replace(FAMILY, deciding_values=None)
    for module in ("registry", "detection", "no_backbone"):
        monkeypatch.setattr(f"streamconv.families.{module}.all_families", lambda: (family,))
    state = convnext_state()
    state["norms.3.bias"] = state["norm.bias"] + 0.1
    source = saved(state, tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", image_size=64)
    parity = api.verify(tmp_path / "out", source, device="cpu").check("parity")
    assert (parity.passed, parity.numbers["first"]) == (False, "cls")


@pytest.mark.transformers
def test_folder_of_transformers_keeps_its_configuration_and_computes_the_same(tmp_path: Path) -> None:
    """The original gets the epsilon of the folder's config.json, so an output that lost it would differ."""
    config = DINOv3ConvNextConfig(
        depths=[*TINY.depths], hidden_sizes=[*TINY.widths], layer_norm_eps=1e-2, image_size=64, drop_path_rate=0.1
    )
    model: Any = DINOv3ConvNextModel(config)
    model.save_pretrained(tmp_path / "theirs")
    plan = api.convert(tmp_path / "theirs", tmp_path / "out", dtype="bfloat16").plan
    assert {key: plan.config[key] for key in ("layer_norm_eps", "image_size", "drop_path_rate")} == {
        "layer_norm_eps": 1e-2, "image_size": 64, "drop_path_rate": 0.1,
    }  # fmt: skip
    assert api.verify(tmp_path / "out", tmp_path / "theirs", device="cpu").passed
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"layer_norm_eps": 0.01', '"layer_norm_eps": 1e-06'))
    found = api.verify(tmp_path / "out", tmp_path / "theirs", device="cpu")
    assert [found.check(name).passed for name in ("bytes", "config", "parity")] == [True, False, False]


def test_original_without_the_second_name_computes_the_same(tmp_path: Path) -> None:
    state = convnext_state(replace(TINY, has_norms=False))
    source = saved(state, tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", image_size=64)
    assert api.verify(tmp_path / "out", source, device="cpu").passed
