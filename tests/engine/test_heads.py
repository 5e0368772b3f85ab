"""The number of attention heads, which tensors do not show: where it comes from, and what is said about it."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import MappingError, PushOptions, UsageError
from streamconv.families.dinov2 import FAMILY
from tests import api
from tests.checkpoints import make_states, saved
from tests.support import run, tiny

# As in the configurations that were published for dinov2-small and so on, and for webssl-dino2b and so on.
PUBLISHED = {384: 6, 768: 12, 1024: 16, 1536: 24, 2688: 21, 3072: 24, 3584: 28, 4096: 32}


def save_zeros(path: Path, hidden: int, layers: int = 1) -> Path:
    """Save a model of one zero: large sizes take neither memory nor space."""
    shapes = FAMILY.sources(tiny(hidden=hidden, layers=layers))
    return saved({name: torch.zeros(1).expand(info.shape) for name, info in shapes.items()}, path)


@pytest.mark.parametrize(("hidden", "heads"), PUBLISHED.items())
def test_sizes_of_published_models_have_their_number(tmp_path: Path, hidden: int, heads: int) -> None:
    plan = api.plan(save_zeros(tmp_path / "x.pth", hidden))
    assert (plan.config["num_attention_heads"], plan.assumed_heads, plan.unproved) == (heads, heads, ())
    assert plan.notes[0] == (
        f"{heads} attention heads of {hidden // heads} channels each, as in the family's published models: tensors do "
        "not show the number (--num-heads)"
    )


@pytest.mark.parametrize(("hidden", "heads"), [(64, 1), (128, 2), (192, 3), (512, 8), (640, 10), (896, 14)])
def test_other_usual_sizes_have_64_channels_a_head_which_is_a_guess(tmp_path: Path, hidden: int, heads: int) -> None:
    source = save_zeros(tmp_path / "x.pth", hidden)
    plan = api.plan(source)
    assert (plan.config["num_attention_heads"], plan.assumed_heads) == (heads, heads)
    assert plan.notes[0] == (
        f"{heads} attention heads of 64 channels each, as in the usual vision transformers: tensors do not show the "
        "number (--num-heads)"
    )
    assert plan.unproved == (f"the number of attention heads ({heads}) is assumed: give --num-heads if you know it",)
    given = api.plan(source, num_heads=heads)
    assert (given.notes[0], given.unproved) == (f"{heads} attention heads, as given by --num-heads", ())
    assert given.fingerprint == plan.fingerprint


@pytest.mark.parametrize(
    ("hidden", "known"),
    [(96, ""), (1088, ""), (1152, " (SigLIP so400m has 16)"), (1280, " (ViT-H has 16, DINOv3's ViT-H+ 20)"),
     (1408, " (ViT-g has 16)"), (1664, " (ViT-bigG has 16, UNI2-g 26)"), (2048, "")],
)  # fmt: skip
def test_sizes_without_a_usual_number_require_it(tmp_path: Path, hidden: int, known: str) -> None:
    source = save_zeros(tmp_path / "x.pth", hidden)
    with pytest.raises(MappingError) as caught:
        api.plan(source)
    assert list(caught.value.problems) == [
        f"tensors do not show the number of attention heads, and models of hidden size {hidden} do not agree on one"
        f"{known}: give the number with --num-heads"
    ]
    plan = api.plan(source, num_heads=16)
    assert plan.config["num_attention_heads"] == 16
    assert plan.notes[0] == "16 attention heads, as given by --num-heads"
    assert plan.unproved == ()


def test_a_given_number_is_checked(tmp_path: Path) -> None:
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    assert "4 attention heads, as given by --num-heads" in run("plan", source, "--num-heads", "4", cwd=tmp_path).stdout
    for heads, error, message in (
        (3, MappingError, r"\(1 problem\):\s.*not divisible by 3 attention heads: .* with --num-heads"),
        (0, UsageError, "cannot have 0 attention heads"),
        (-1, UsageError, "cannot have -1 attention heads"),
    ):
        with pytest.raises(error, match=message):
            api.plan(source, num_heads=heads)


def test_published_models_have_their_own_number(tmp_path: Path) -> None:
    """It is known and not mentioned; with another number, a file of their shapes is another model."""
    small, _ = make_states(tiny(layers=12, hidden=384))
    small["pos_embed"] = torch.zeros(1, 1370, 384)
    published = saved(small, tmp_path / "dinov2_vits14_pretrain.pth")
    assert (api.plan(published).notes, api.plan(published).unproved) == ((), ())
    assert api.plan(published, num_heads=6).model is not None
    assert api.plan(published, num_heads=12).model is None
    own = saved({"teacher": small}, tmp_path / "teacher_checkpoint.pth")
    assert any("6 attention heads of 64 channels each" in note for note in api.plan(own).notes)
    assert api.plan(own, num_heads=6).notes[0] == "6 attention heads, as given by --num-heads"
    with pytest.raises(UsageError, match=r"is not a published model.* Give -o DIR"):
        streamconv.run(own, verification=None)
    with pytest.raises(UsageError, match="published as dinov2-small, and these weights are not known to be its own"):
        streamconv.run(own, tmp_path / "dinov2-small", verification=None, push=PushOptions(unverified=True))
    api.convert(own, tmp_path / "converted")
    assert not any("attention heads" in note for note in api.plan(tmp_path / "converted").notes)


def test_a_published_model_by_name_takes_no_other_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    small, _ = make_states(tiny(layers=12, hidden=384))
    small["pos_embed"] = torch.zeros(1, 1370, 384)
    saved(small, tmp_path / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth")
    assert api.plan("dinov2_vits14", num_heads=6).is_published
    with pytest.raises(UsageError, match=r"dinov2_vits14 has another number of attention heads than 12\. Omit"):
        api.plan("dinov2_vits14", num_heads=12)


HUGGING_FACE = {"hidden_size": 1280, "num_hidden_layers": 1, "num_attention_heads": 16}
TIMM = {"architecture": "vit_huge_patch14_224", "model_args": {"embed_dim": 1280, "depth": 1, "num_heads": 16}}


@pytest.mark.parametrize("config", [HUGGING_FACE, TIMM], ids=["transformers", "timm"])
@pytest.mark.parametrize("filename", ["x.pth", "model.safetensors"])
def test_config_beside_a_file_in_the_authors_names_gives_the_number(
    tmp_path: Path, config: dict[str, Any], filename: str
) -> None:
    source = save_zeros(tmp_path / "x.pth", 1280)
    if filename != "x.pth":
        state = {name: value.contiguous() for name, value in torch.load(source).items()}
        safetensors.torch.save_file(state, tmp_path / filename)
        source.unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = api.plan(tmp_path / filename)
    assert (plan.config["num_attention_heads"], plan.assumed_heads, plan.unproved) == (16, None, ())
    assert plan.notes[0] == "16 attention heads, as stated by the config.json beside it"
    assert api.plan(tmp_path / filename, num_heads=20).config["num_attention_heads"] == 20


@pytest.mark.parametrize(
    "config",
    [
        {**HUGGING_FACE, "hidden_size": 768},
        {**HUGGING_FACE, "num_hidden_layers": 32},
        {**HUGGING_FACE, "num_attention_heads": "16"},
        {**HUGGING_FACE, "num_attention_heads": True},
        {**HUGGING_FACE, "num_attention_heads": -16},
        {"num_attention_heads": 16},
        {**TIMM, "model_args": {**TIMM["model_args"], "depth": 2}},  # type: ignore[dict-item]
        {**TIMM, "model_args": {"num_heads": 16}},
        {**TIMM, "model_args": [16]},
        {"hidden_size": [1280]},
        {},
        [],
    ],
    ids=str,
)
def test_config_of_another_model_beside_the_file_is_ignored(tmp_path: Path, config: object) -> None:
    source = save_zeros(tmp_path / "x.pth", 1280)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MappingError, match="give the number with --num-heads"):
        api.plan(source)
    source = save_zeros(tmp_path / "small.pth", 128)
    assert api.plan(source).config["num_attention_heads"] == 2


def test_config_of_a_converted_model_gives_the_number(tmp_path: Path) -> None:
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", num_heads=4)
    for place in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        plan = api.plan(place)
        assert (plan.config["num_attention_heads"], plan.assumed_heads, plan.unproved) == (4, None, ())
        assert not any("attention heads" in note for note in plan.notes)
    with pytest.raises(UsageError, match=r"The config\.json of the source gives 4 attention heads\. Omit --num-heads"):
        api.plan(tmp_path / "out", num_heads=2)


def test_guess_does_not_become_a_fact_in_a_folder_that_is_converted_again(tmp_path: Path) -> None:
    source = save_zeros(tmp_path / "x.pth", 128)
    for output in ("first", "second", "third"):
        done = api.convert(source, tmp_path / output)
        assert done.plan.unproved == ("the number of attention heads (2) is assumed: give --num-heads if you know it",)
        source = done.output
    assert any("2 attention heads, assumed earlier" in note for note in api.plan(source).notes)
    assert api.plan(source, num_heads=2).unproved == ()
    corrected = api.convert(source, tmp_path / "corrected", num_heads=1).plan
    assert corrected.config["num_attention_heads"] == 1
    assert "config.json: kept from the source; changed: num_attention_heads 2 → 1" in corrected.notes
    assert corrected.unproved == api.plan(tmp_path / "corrected").unproved == ()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    assert api.plan(source).unproved == ()
