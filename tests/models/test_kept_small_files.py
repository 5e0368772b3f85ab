"""What a model's own config.json and image processor say is kept, with transformers as the reference."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor

from streamconv.families.dinov2 import FAMILY
from streamconv.hub.card import make_card
from streamconv.output.manifest import Manifest
from streamconv.planning import plan_json
from streamconv.verification.image import make_image
from tests import api
from tests.checkpoints import make_states, saved
from tests.support import tiny

SIZES = {
    "hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "cow"}, "label2id": {"cat": 0, "dog": 1, "cow": 2}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "own epsilon and unknown keys": (
        "Dinov2Model", {"layer_norm_eps": 1e-5, "trained_on": {"site": "A", "years": [1, 2]}, "drop_path_rate": 0.1}
    ),
    "backbone": ("Dinov2Backbone", {"out_indices": [1, 2], "apply_layernorm": False}),
    "backbone with flat maps": ("Dinov2Backbone", {"out_features": ["stem", "stage2"], "reshape_hidden_states": False}),
    "backbone with registers": ("Dinov2WithRegistersBackbone", {"out_indices": [0, 1], "layer_norm_eps": 1e-4}),
    "registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}),
    "multi-label classifier": (
        "Dinov2ForImageClassification",
        {**LABELS, "problem_type": "multi_label_classification", "layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.1},
    ),
    "classifier of labels that repeat": (
        "Dinov2WithRegistersForImageClassification",
        {"id2label": {0: "a", 1: "a", 2: "b"}, "label2id": {"a": 0, "b": 2}},
    ),
    "no mask token": ("Dinov2Model", {"use_mask_token": False}),
}  # fmt: skip


def saved_model(folder: Path, name: str, entries: dict[str, Any]) -> Any:
    """Save a random model with transformers, and return it."""
    torch.manual_seed(0)
    kind: Any = getattr(transformers, name)
    model = kind(kind.config_class(**{**SIZES, **entries})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


def outputs(model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(pixels.to(model.dtype)).to_tuple()
    return [each for part in found for each in (part if isinstance(part, tuple) else (part,))]


@pytest.mark.transformers
@pytest.mark.parametrize("what", MODELS)
def test_config_is_kept_except_for_the_dtype_and_the_model_computes_the_same(tmp_path: Path, what: str) -> None:
    name, entries = MODELS[what]
    model = saved_model(tmp_path / "theirs", name, entries)
    done = api.convert(tmp_path / "theirs", tmp_path / "ours", dtype="bfloat16")
    theirs, ours = (json.loads((tmp_path / each / "config.json").read_bytes()) for each in ("theirs", "ours"))
    assert theirs.pop("transformers_version")
    assert {**theirs, "dtype": "bfloat16"} == ours
    assert done.plan.architecture == name == ours["architectures"][0]
    assert any(note.startswith("config.json: kept from the source; changed: dtype float32 → bfloat16")
               for note in done.plan.notes)  # fmt: skip
    configs = [AutoConfig.from_pretrained(tmp_path / each).to_dict() for each in ("theirs", "ours")]
    for config in configs:
        for key in ("dtype", "_name_or_path", "transformers_version"):
            config.pop(key, None)
    assert configs[0] == configs[1]
    again = type(model).from_pretrained(tmp_path / "ours", dtype=torch.bfloat16).eval()
    pixels = torch.rand(1, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    for one, other in zip(outputs(model.bfloat16(), pixels), outputs(again, pixels), strict=True):
        assert torch.equal(one, other)
    found = api.verify(tmp_path / "ours", tmp_path / "theirs", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").numbers["largest"] == 0.0


@pytest.mark.transformers
def test_original_with_another_epsilon_than_the_config_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity reads the epsilon: a conversion that loses it is found."""
    saved_model(tmp_path / "theirs", "Dinov2Model", {"layer_norm_eps": 1e-2})
    api.convert(tmp_path / "theirs", tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_bytes())
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    found = api.verify(tmp_path / "ours", tmp_path / "theirs", device="cpu")
    assert [found.check(name).passed for name in ("config", "parity")] == [False, False]


@pytest.mark.transformers
def test_backbone_that_lacks_a_tensor_does_not_load(tmp_path: Path) -> None:
    saved_model(tmp_path / "theirs", "Dinov2Backbone", {"out_indices": [1, 2]})
    api.convert(tmp_path / "theirs", tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["layernorm.bias"]
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    load = api.verify(tmp_path / "ours", tmp_path / "theirs", device="cpu").check("load")
    assert load.problems == ("missing_keys: layernorm.bias",)


def test_predictions_of_a_multi_label_classifier_are_independent(tmp_path: Path) -> None:
    """Each label has a probability of its own, as in transformers' pipeline."""
    entries = {**LABELS, "problem_type": "multi_label_classification"}
    model = saved_model(tmp_path / "theirs", "Dinov2ForImageClassification", entries)
    api.convert(tmp_path / "theirs", tmp_path / "ours")
    found = dict(api.verify(tmp_path / "ours", tmp_path / "theirs", device="cpu").predictions)
    pipeline: Any = transformers.pipeline(
        "image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained(tmp_path / "ours")
    )
    wanted = {each["label"]: each["score"] for each in pipeline(make_image())}
    assert found.keys() == wanted.keys()
    assert all(abs(found[label] - wanted[label]) < 0.05 for label in wanted)


BIT = {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 60}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 56, "width": 56}, "do_rescale": True,
    "rescale_factor": 0.00392156862745098, "do_normalize": True, "do_convert_rgb": True,
    "image_mean": [0.53, 0.52, 0.51], "image_std": [0.26, 0.25, 0.24],
}  # fmt: skip
PROCESSORS: dict[str, dict[str, Any]] = {
    "own mean, std and size": BIT,
    "sizes as numbers": {**BIT, "size": 60, "crop_size": 56},
    "sizes as lists": {**BIT, "size": [60, 84], "crop_size": [56, 70]},
    "no crop": {**BIT, "do_center_crop": False, "size": {"height": 56, "width": 56}},
    "an odd margin": {**BIT, "size": {"shortest_edge": 57}, "crop_size": {"height": 50, "width": 42}},
    "a crop beyond the image": {**BIT, "size": {"shortest_edge": 41}, "crop_size": {"height": 56, "width": 56}},
    "bilinear, not normalised": {**BIT, "resample": 2, "do_normalize": False},
    "another scale": {**BIT, "rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
    "only its class": {"image_processor_type": "BitImageProcessor"},
    "without its class": {key: value for key, value in BIT.items() if key != "image_processor_type"},
    "ViT": {"image_processor_type": "ViTImageProcessor", "size": 56},
    "ViT as transformers 4 names it": {"feature_extractor_type": "ViTFeatureExtractor", "size": 56},
    "CLIP": {"image_processor_type": "CLIPImageProcessor", "size": 60, "crop_size": 56},
    "a fast class": {**BIT, "image_processor_type": "BitImageProcessorFast"},
    "DINOv3": {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 56, "width": 56}},
    "DINOv3 with a size as a number": {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": 56},
    "DINOv3 with a crop and another scale": {
        **BIT, "image_processor_type": "DINOv3ViTImageProcessorFast", "resample": 2, "rescale_factor": 1 / 127.5,
    },
    "Siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}, "resample": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    saved_model(folder, "Dinov2Model", {})
    return folder


def with_processor(model_folder: Path, folder: Path, processor: dict[str, Any]) -> Path:
    """Return a folder with the model's files and another image processor."""
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.transformers
@pytest.mark.parametrize("what", PROCESSORS)
def test_image_processor_is_kept_and_its_steps_are_proved(tmp_path: Path, model_folder: Path, what: str) -> None:
    source = with_processor(model_folder, tmp_path / "theirs", PROCESSORS[what])
    done = api.convert(source, tmp_path / "ours", dtype="float16")
    assert json.loads((tmp_path / "ours" / "preprocessor_config.json").read_bytes()) == PROCESSORS[what]
    assert "preprocessor_config.json: kept from the source, unchanged" in done.plan.notes
    found = api.verify(tmp_path / "ours", source, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    check = found.check("preprocessing")
    backend = "tensors" if what.startswith("DINOv3") else "Pillow"
    assert check.proves.startswith(f"the saved image processor is the source's own, unchanged; with {backend}, it prod")
    assert not check.not_checked
    assert "original" not in check.finding
    steps = done.plan.pixel_steps
    assert steps is not None
    loaded: Any = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    if loaded.do_normalize:
        assert (list(steps.mean), list(steps.std)) == (list(loaded.image_mean), list(loaded.image_std))
    size = 56 if steps.size == (56, 56) else 224 if what == "only its class" else 28
    assert found.check("parity").numbers["size"] == size


def test_other_pixels_than_those_of_its_steps_are_found(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers is made to read another mean from the file than streamconv does."""
    source = with_processor(model_folder, tmp_path / "theirs", BIT)
    api.convert(source, tmp_path / "ours")
    load = AutoImageProcessor.from_pretrained
    monkeypatch.setattr(
        AutoImageProcessor, "from_pretrained", lambda *given, **more: load(*given, **more, image_mean=[0.5, 0.5, 0.5])
    )
    check = api.verify(tmp_path / "ours", source, device="cpu").check("preprocessing")
    assert check.passed is False
    assert "those of its steps" in check.problems[0]
    assert check.finding == "the saved image processor does not produce the pixels that it should"


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        ({"image_processor_type": "DPTImageProcessor", "size": {"height": 56, "width": 56}, "do_pad": False,
          "keep_aspect_ratio": True, "ensure_multiple_of": 14}, "the steps of a DPTImageProcessor"),
        ({**BIT, "size": {"shortest_edge": 56, "longest_edge": 100}}, "the size .*longest_edge.* of its BitImage"),
        ({**BIT, "image_mean": [0.5], "image_std": [0.5]}, "it normalises 1 channels, not 3"),
        ({"image_processor_type": "MyProcessor", "auto_map": {"AutoImageProcessor": "mine.MyProcessor"}},
         "the steps of a MyProcessor"),
    ],
)  # fmt: skip
def test_image_processor_with_other_steps_is_kept_and_named_as_unchecked(
    tmp_path: Path, model_folder: Path, processor: dict[str, Any], reason: str
) -> None:
    source = with_processor(model_folder, tmp_path / "theirs", processor)
    api.convert(source, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "preprocessor_config.json").read_bytes()) == processor
    found = api.verify(tmp_path / "ours", source, device="cpu")
    assert found.check("preprocessing").passed is not False
    assert found.check("parity").passed
    assert found.check("parity").numbers["size"] == 28
    assert re.search(f"the image processor's pixels were not compared: .*{reason}", found.conclusion.details)


@pytest.mark.transformers
@pytest.mark.parametrize("channels", [1, 2, 12])
def test_other_channels_are_converted_without_an_image_processor(tmp_path: Path, channels: int) -> None:
    source = saved(make_states(replace(tiny(), channels=channels))[0], tmp_path / "x.pth")
    done = api.convert(source, tmp_path / "out", num_heads=2)
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    assert any("no preprocessor_config.json is written" in note for note in done.plan.notes)
    assert AutoConfig.from_pretrained(tmp_path / "out").num_channels == channels
    found = api.verify(tmp_path / "out", source, device="cpu", num_heads=2)
    assert [check.passed for check in found.checks] == [True, True, True, True, None]
    assert found.conclusion.details == "the preprocessing check did not run."
    assert plan_json.from_json(plan_json.to_json(done.plan)) == done.plan


@pytest.mark.transformers
@pytest.mark.parametrize("classes", [None, 3])
def test_usage_in_the_card_runs_without_an_image_processor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: int | None
) -> None:
    backbone, head = make_states(replace(tiny(classes=classes), channels=12))
    head_path = saved(head, tmp_path / "h.pth") if head else None
    api.convert(saved(backbone, tmp_path / "x.pth"), tmp_path / "out", head=head_path)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    code = make_card(manifest, "o/n").partition("```python\n")[2].partition("```")[0]
    exec(code.replace('"o/n"', repr(str(tmp_path / "out"))), {})
    assert re.search("LABEL_[012]" if classes else r"torch.Size\(\[1, 17, 128\]\)", capsys.readouterr().out)


def test_wrong_pixels_of_twelve_channels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(make_states(replace(tiny(), channels=12))[0], tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", image_mean=0.5, image_std=0.5)
    load = AutoImageProcessor.from_pretrained
    monkeypatch.setattr(
        AutoImageProcessor, "from_pretrained", lambda *given, **more: load(*given, **more, image_mean=[0.49] * 12)
    )
    check = api.verify(tmp_path / "out", source, device="cpu", parity=False).check("preprocessing")
    assert check.passed is False
    assert "pixels differ from those of its steps by 0.0" in check.problems[0]


def test_swapped_channels_are_found(tmp_path: Path) -> None:
    """The image that both models see has no two equal channels."""
    source = saved(make_states(replace(tiny(), channels=12))[0], tmp_path / "x.pth")
    api.convert(source, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    key = "embeddings.patch_embeddings.projection.weight"
    state[key] = state[key].roll(3, dims=1).contiguous()
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    assert api.verify(tmp_path / "out", source, device="cpu").check("parity").passed is False


@pytest.mark.transformers
def test_every_equal_architecture_has_a_task_and_a_class() -> None:
    for plain, equal in FAMILY.equal_architectures.items():
        for name in (plain, *equal):
            assert hasattr(transformers, name)
            assert name in FAMILY.pipeline_tags
