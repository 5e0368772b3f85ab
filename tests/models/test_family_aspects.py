"""Conversion, verification and revert of a family that lacks an aspect, for example DINOv2 without it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import streamconv
from streamconv import MappingError, UsageError
from streamconv.families.base import ConversionSpec, Family
from streamconv.families.dinov2 import FAMILY, conversion_spec
from streamconv.families.dinov2_geometry import Dimensions
from streamconv.families.rules import drop
from tests import api
from tests.checkpoints import make_states
from tests.support import Save, tiny


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
    with pytest.raises(MappingError, match="drops tensors, which cannot be restored") as caught:
        streamconv.revert(done.output, tmp_path / "back.pth")
    assert caught.value.problems == ("blocks.{i}.attn.bias_mask: a constant of the original's code",)
    assert not (tmp_path / "back.pth").exists()
