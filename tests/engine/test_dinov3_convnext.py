"""DINOv3's ConvNeXt: its names, files and configuration, against torch and transformers."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTImageProcessorFast

import streamconv
from streamconv import MappingError
from streamconv.families.dinov3_convnext import FAMILY, Dimensions
from streamconv.planning.shards import to_json
from tests import api
from tests.checkpoints import prefixed, saved
from tests.convnext import TINY, State, convnext_state
from tests.support import GOLDEN, contents, expanded, plan_of_shapes

NAMES = [model.name for model in FAMILY.models]


def in_transformers(state: State) -> State:
    """Rename the tensors as transformers' conversion script describes it, and omit norms.3."""
    renamed = {}
    for key, tensor in state.items():
        new = re.sub(r"\bnorm\b", "layer_norm", key).replace("dwconv", "depthwise_conv")
        new = re.sub(
            r"^downsample_layers\.(\d)", r"stages.\1.downsample_layers", new.replace("pwconv", "pointwise_conv")
        )
        renamed[re.sub(r"^stages\.(\d)\.(?=\d)", r"stages.\1.layers.", new)] = tensor
    return {key: tensor for key, tensor in renamed.items() if not key.startswith("norms.")}


def transformers_config(sizes: Dimensions) -> DINOv3ConvNextConfig:
    return DINOv3ConvNextConfig(
        depths=[*sizes.depths], hidden_sizes=[*sizes.widths], num_channels=sizes.channels, dtype="float32"
    )


@pytest.mark.transformers
@pytest.mark.parametrize("sizes", [TINY, Dimensions((2, 1, 1, 2), (4, 4, 12, 8), channels=4)])
def test_every_tensor_has_its_name_in_transformers(tmp_path: Path, sizes: Dimensions) -> None:
    state = convnext_state(sizes)
    done = api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "out")
    assert done.plan.dimensions == sizes
    written, wanted = load_file(tmp_path / "out" / "model.safetensors"), in_transformers(state)
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)
    reasons = [
        f"the same tensor as norm.{part}, which the authors' model has under two names" for part in ("weight", "bias")
    ]
    assert [each.reason for each in done.plan.skipped] == reasons


@pytest.mark.parametrize("limit", ["10KB", "50GB"])
def test_files_equal_those_of_save_pretrained(tmp_path: Path, limit: str) -> None:
    state = convnext_state()
    model = DINOv3ConvNextModel(transformers_config(TINY))
    model.load_state_dict({f"model.{key}" if key[0] == "s" else key: t for key, t in in_transformers(state).items()})
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "ours", max_shard_size=limit)
    theirs, ours = contents(tmp_path / "theirs"), contents(tmp_path / "ours")
    config = json.loads(theirs.pop("config.json"))
    assert config.pop("transformers_version")
    assert ours.pop("config.json") == to_json(config)
    assert ours.keys() - theirs.keys() == {"preprocessor_config.json", "streamconv.json"}
    assert all(ours[name] == data for name, data in theirs.items())


@pytest.mark.parametrize("name", NAMES)
def test_published_models_have_the_configuration_of_transformers(name: str, tmp_path: Path) -> None:
    golden = GOLDEN[name]
    file = next(model.backbone.filename for model in FAMILY.models if model.name == name)
    plan = plan_of_shapes(expanded(golden["source"], golden["layers"]), tmp_path, file)
    assert (plan.model_name, plan.is_published) == (name, True)
    assert not any("processor" in note for note in plan.notes)
    config = transformers_config(plan.dimensions)
    config.architectures = ["DINOv3ConvNextModel"]
    config.save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert theirs.pop("transformers_version")
    assert plan.config == theirs
    DINOv3ViTImageProcessorFast(size={"height": 224, "width": 224}, resample=2).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "preprocessor_config.json").read_text("utf-8"))
    ours = json.loads(plan.small_files["preprocessor_config.json"])
    # transformers 4.57 reads only this name, and 5 reads both.
    assert ours.pop("image_processor_type") == theirs.pop("image_processor_type").removesuffix("Fast") + "Fast"
    assert ours == theirs


def test_equal_norms_without_a_second_name_are_converted(tmp_path: Path) -> None:
    sizes = replace(TINY, has_norms=False)
    plain = api.convert(saved(convnext_state(sizes), tmp_path / "x.pth"), tmp_path / "out")
    assert plain.plan.dimensions == sizes
    assert not plain.plan.skipped
    assert any("it may be another ConvNeXt than DINOv3's" in note for note in plain.plan.notes)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_norms_that_differ_under_their_two_names_are_refused(tmp_path: Path, part: str) -> None:
    state = convnext_state()
    state[f"norms.3.{part}"] = state[f"norm.{part}"].clone()
    api.plan(saved(state, tmp_path / "equal.pth"))
    state[f"norms.3.{part}"][-1] += 1e-7
    with pytest.raises(MappingError, match=r"norms\.3 and norm are one tensor .* but their values differ"):
        api.plan(saved(state, tmp_path / "x.pth"))


def test_every_problem_of_a_damaged_file_is_listed(tmp_path: Path) -> None:
    state = convnext_state()
    del state["stages.2.1.dwconv.bias"]
    state["norms.2.weight"] = torch.ones(24)
    state["downsample_layers.1.1.weight"] = torch.ones(16, 8, 3, 3)
    with pytest.raises(MappingError) as caught:
        api.plan(saved(state, tmp_path / "x.pth"))
    assert sorted(caught.value.problems) == [
        "missing: stages.2.1.dwconv.bias [24]",
        "unexpected: norms.2.weight [24]",
        "wrong shape: downsample_layers.1.1.weight is [16, 8, 3, 3], not [16, 8, 2, 2]",
    ]


def test_stage_without_blocks_is_named(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in convnext_state().items() if not key.startswith("stages.1.")}
    with pytest.raises(MappingError) as caught:
        api.plan(saved(state, tmp_path / "x.pth"))
    assert "stage 1 has no blocks" in caught.value.problems


def test_weights_of_transformers_backbone_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import DINOv3ConvNextBackbone  # which 4.57 does not have

    DINOv3ConvNextBackbone(transformers_config(TINY)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(MappingError) as caught:
        api.plan(tmp_path / "theirs")
    assert caught.value.problems[0].startswith("the last norm is missing. If transformers' DINOv3ConvNextBackbone")


def test_config_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    DINOv3ConvNextModel(transformers_config(TINY)).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(path.read_text().replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    with pytest.raises(MappingError) as caught:
        api.plan(tmp_path / "theirs")
    assert caught.value.problems == (
        "its config.json sets hidden_act to 'relu', but dinov3_convnext models have 'gelu'",
    )


def test_backbone_of_a_training_checkpoint_is_converted(tmp_path: Path) -> None:
    heads = {"dino_head.last_layer.weight": torch.ones(4, 4), "ibot_head.mlp.0.bias": torch.ones(4)}
    teacher = {"teacher": {**prefixed(convnext_state(), "backbone."), **heads}}
    plan = api.plan(saved(teacher, tmp_path / "teacher_checkpoint.pth"))
    assert plan.dimensions == TINY
    assert {each.start for each in plan.skipped} == {
        "teacher.backbone.norms.3.weight", "teacher.backbone.norms.3.bias", "teacher.dino_head.", "teacher.ibot_head.",
    }  # fmt: skip


@pytest.mark.transformers
def test_reverting_gives_the_authors_tensors_with_both_names(tmp_path: Path) -> None:
    state = convnext_state()
    api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "out")
    done = streamconv.revert(tmp_path / "out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert done.restored == ()


def test_tensors_in_transformers_names_are_converted_again(tmp_path: Path) -> None:
    """From a folder, a state dict with the names that transformers 5 has in memory, and a part of a larger model."""
    state = convnext_state()
    done = api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "out")
    again = api.convert(tmp_path / "out", tmp_path / "again")
    model = DINOv3ConvNextModel.from_pretrained(tmp_path / "out")
    memory = api.convert(saved(model.state_dict(), tmp_path / "memory.pth"), tmp_path / "third")
    whole = prefixed(in_transformers(state), "model.")
    inside = api.convert(saved(whole, tmp_path / "inside.pth"), tmp_path / "fourth")
    for other in (again, memory, inside):
        assert (other.plan.dimensions, other.plan.skipped) == (TINY, ())
        assert contents(other.output)["model.safetensors"] == contents(done.output)["model.safetensors"]


def test_synthetic_checkpoint_is_that_of_the_published_model(tmp_path: Path) -> None:
    streamconv.synth("dinov3_convnext_tiny", tmp_path / "x.pth")
    state = torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == expanded(
        GOLDEN["dinov3_convnext_tiny"]["source"], GOLDEN["dinov3_convnext_tiny"]["layers"]
    )
    assert torch.equal(state["norms.3.weight"], state["norm.weight"])
    assert api.plan(tmp_path / "x.pth").model_name == "dinov3_convnext_tiny"
