"""Conversion, verification and revert of a family that lacks an aspect, for example DINOv2 without it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2
from transformers import AutoImageProcessor

import streamconv
from streamconv import MappingError, UsageError
from streamconv.families.aspects import ImageProcessor
from streamconv.families.base import ConversionSpec, Family
from streamconv.families.dinov2 import FAMILY, conversion_spec
from streamconv.families.dinov2_geometry import Dimensions
from streamconv.families.registry import find_model
from streamconv.families.rules import drop
from streamconv.verification.image import make_image
from tests import api
from tests.checkpoints import make_states
from tests.support import GOLDEN, Save, expanded, plan_of_shapes, tiny


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Family], None]:
    def make(family: Family) -> None:
        for module in ("registry", "detection", "no_backbone"):
            monkeypatch.setattr(f"streamconv.families.{module}.all_families", lambda: (family,))

    return make


def test_without_an_image_processor_none_is_written_or_checked(
    tmp_path: Path, save: Save, use: Callable[[Family], None]
) -> None:
    use(replace(FAMILY, image_processor=None))
    backbone, _ = save(tiny())
    done = api.convert(backbone, tmp_path / "out")
    assert {path.name for path in done.output.iterdir()} == {"model.safetensors", "config.json", "streamconv.json"}
    assert not any("processor" in note for note in done.plan.notes)
    again = api.convert(done.output, tmp_path / "again", dtype="bfloat16")
    assert again.plan.notes[-1] == "config.json: kept from the source; changed: dtype float32 → bfloat16"
    for parity in (True, False):
        found = api.verify(done.output, backbone, device="cpu", parity=parity)
        assert found.passed
        assert [check.passed for check in found.checks] == [True, True, True, parity or None, None]
        assert found.check("preprocessing").proves == "dinov2 models have no image processor"


DINOV3_PROCESSOR = {
    "image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 224, "width": 224}, "resample": 2,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


@pytest.mark.transformers
def test_rounding_by_the_authors_is_measured_and_other_differences_fail(
    tmp_path: Path, save: Save, use: Callable[[Family], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(replace(FAMILY, image_processor=ImageProcessor(DINOV3_PROCESSOR, authors_round=True)))
    backbone, _ = save(tiny())
    folder = api.convert(backbone, tmp_path / "out").output
    check = api.verify(folder, backbone, device="cpu", parity=False).check("preprocessing")
    authors = v2.Compose([
        v2.ToImage(), v2.Resize((224, 224), antialias=True), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(DINOV3_PROCESSOR["image_mean"], DINOV3_PROCESSOR["image_std"]),
    ])  # fmt: skip
    processor: Any = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(make_image(), return_tensors="pt")["pixel_values"][0]
    assert check.passed
    assert check.numbers["rounded"] == (pixels - authors(make_image())).abs().max()
    assert 0.5 < check.numbers["rounded"] / check.numbers["grey_level"] < 1
    assert check.numbers["default"] < 1e-5
    assert "rounds to whole grey levels" in check.proves
    load = AutoImageProcessor.from_pretrained
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", lambda *given, **more: load(*given, **more, resample=3))
    check = api.verify(folder, backbone, device="cpu", parity=False).check("preprocessing")
    assert check.passed is False
    assert ["those of its steps" in check.problems[0], "the original's" in check.problems[1]] == [True, True]


def test_note_about_the_image_processor_of_a_published_model_is_in_the_output(
    tmp_path: Path, use: Callable[[Family], None]
) -> None:
    family, model = find_model("dinov2_vits14")
    note = "preprocessor_config.json: not the one that was published"
    use(replace(family, models=(replace(model, image_processor_note=note),)))
    assert note in plan_of_shapes(expanded(GOLDEN[model.name]["source"], 12), tmp_path, f"{model.name}.pth").notes


def test_without_attention_heads_nothing_is_assumed_about_them(
    tmp_path: Path, save: Save, use: Callable[[Family], None]
) -> None:
    use(replace(FAMILY, attention_heads=None))
    backbone, _ = save(tiny())
    with pytest.raises(UsageError, match=r"no number of heads to choose\. Omit --num-heads"):
        api.plan(backbone, num_heads=2)
    api.convert(backbone, tmp_path / "out")
    parity = api.verify(tmp_path / "out", backbone, device="cpu").check("parity")
    assert parity.passed
    assert "heads" not in parity.proves
    streamconv.revert(tmp_path / "out", tmp_path / "back.pth")
    assert torch.load(tmp_path / "back.pth", weights_only=True).keys() == make_states(tiny())[0].keys()


def test_without_a_classifier_head_no_head_is_accepted(
    tmp_path: Path, save: Save, use: Callable[[Family], None]
) -> None:
    backbone, head = save(tiny(classes=3))
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    api.plan(backbone, head=head, labels=tmp_path / "labels.txt")
    use(replace(FAMILY, classifier_head=None))
    with pytest.raises(UsageError, match=r"is a dinov2 model, which takes no head\. Omit --head"):
        api.plan(backbone, head=head)
    with pytest.raises(UsageError, match="Only a classifier has labels"):
        api.plan(backbone, labels=tmp_path / "labels.txt")
    assert "id2label" not in api.plan(backbone).config


def test_without_block_chunks_keys_are_taken_as_they_are(
    tmp_path: Path, save: Save, use: Callable[[Family], None]
) -> None:
    backbone, _ = save(tiny())
    folder = api.convert(backbone, tmp_path / "out").output
    streamconv.revert(folder, tmp_path / "chunked.pth", block_chunks=1)
    assert api.plan(tmp_path / "chunked.pth").block_chunks == 1
    use(replace(FAMILY, block_chunks=None))
    with pytest.raises(MappingError, match=r"unexpected: blocks\.0\.0\.norm1\.weight"):
        api.plan(tmp_path / "chunked.pth")
    with pytest.raises(UsageError, match=r"A dinov2 model has no block chunks\. Omit --block-chunks"):
        streamconv.revert(folder, tmp_path / "back.pth", block_chunks=1)
    streamconv.revert(folder, tmp_path / "back.pth")


def test_dropped_tensors_are_not_written_and_not_reverted(tmp_path: Path, use: Callable[[Family], None]) -> None:
    rule = drop("blocks.{i}.attn.bias_mask", "a constant of the original's code", "3D")

    def with_drop(sizes: Dimensions) -> ConversionSpec:
        spec = conversion_spec(sizes)
        return replace(spec, rules=(*spec.rules, rule))

    use(replace(FAMILY, conversion_spec=with_drop))
    state, _ = make_states(tiny())
    torch.save(state, tmp_path / "x.pth")
    masks = {f"blocks.{i}.attn.bias_mask": torch.ones(3 * 128, dtype=torch.bool) for i in range(3)}
    torch.save({**state, **masks}, tmp_path / "masked.pth")
    plain = api.convert(tmp_path / "x.pth", tmp_path / "plain").output
    done = api.convert(tmp_path / "masked.pth", tmp_path / "out")
    skipped = "blocks.{i}.attn.bias_mask (3 tensors, 1,152 bytes): a constant of the original's code"
    assert [str(each) for each in done.plan.skipped] == [skipped]
    assert json.loads((done.output / "streamconv.json").read_bytes())["skipped"] == [skipped]
    assert (done.output / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    with pytest.raises(MappingError, match="drops tensors that cannot be restored") as caught:
        streamconv.revert(done.output, tmp_path / "back.pth")
    assert caught.value.problems == ("blocks.{i}.attn.bias_mask: a constant of the original's code",)
    assert not (tmp_path / "back.pth").exists()
