"""The image processor that the user gives, for a conversion and later for its verification."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor

import streamconv
from streamconv import ConversionOptions, OutputError, UsageError
from streamconv.families.dinov2 import FAMILY
from streamconv.output.manifest import Manifest
from streamconv.planning import plan_json
from tests import api
from tests.checkpoints import make_states, saved
from tests.support import run, tiny

NAME = "preprocessor_config.json"
OWN = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 70}, "crop_size": 70, "mine": [1, 2],
    "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1],
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(make_states(tiny())[0], tmp_path / "x.pth")


def written(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / NAME).read_bytes()))


def test_options_replace_entries_and_are_noted(source: Path, tmp_path: Path) -> None:
    default = api.plan(source).image_processor
    assert default is not None
    words = ("--image-mean", "0.5,0.6,0.7", "--image-std", "0.25", "--image-size", "70")
    done = run("convert", source, "-o", "out", *words, cwd=tmp_path, COLUMNS="300")
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "out") == {
        **default, "image_mean": [0.5, 0.6, 0.7], "image_std": [0.25] * 3, "size": {"shortest_edge": 70},
        "crop_size": {"height": 70, "width": 70},
    }  # fmt: skip
    assert (
        f"{NAME}: --image-mean, --image-std and --image-size as given (the shorter side is resized to 70, and 70 x 70 "
        "pixels are cut from the centre); the rest is that of published dinov2 models"
    ) in done.stdout
    assert "that of published dinov2 models (" not in done.stdout


def test_the_library_takes_numbers(source: Path) -> None:
    planned = api.plan(source, image_mean=0.5, image_std=(0.1, 0.2, 0.3))
    assert planned.image_processor is not None
    assert (planned.image_processor["image_mean"], planned.image_processor["image_std"]) == ([0.5] * 3, [0.1, 0.2, 0.3])
    assert planned.image_processor_from == "user"
    assert plan_json.from_json(plan_json.to_json(planned)) == planned
    assert planned.fingerprint != api.plan(source).fingerprint


def test_a_file_is_written_as_it_is(source: Path, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    done = api.convert(source, tmp_path / "out", image_processor=tmp_path / "own.json")
    assert written(tmp_path / "out") == OWN
    assert f"{NAME}: from own.json" in done.plan.notes


def test_options_win_over_the_processor_of_the_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    api.convert(source, tmp_path / "first", image_processor=tmp_path / "own.json")
    kept = api.convert(tmp_path / "first", tmp_path / "kept")
    assert written(tmp_path / "kept") == OWN
    assert kept.plan.image_processor_from == "source"
    done = api.convert(tmp_path / "first", tmp_path / "second", image_mean="0.5")
    assert written(tmp_path / "second") == {**OWN, "image_mean": [0.5] * 3, "do_normalize": True}
    assert f"{NAME}: --image-mean as given; the rest is that of the source" in done.plan.notes


def test_another_image_processor_is_another_conversion(source: Path, tmp_path: Path) -> None:
    api.convert(source, tmp_path / "out", image_mean=0.5)
    assert api.convert(source, tmp_path / "out", image_mean=(0.5, 0.5, 0.5)).was_finished
    with pytest.raises(OutputError, match="image processor"):
        api.convert(source, tmp_path / "out", image_mean=0.25)


def test_verification_knows_what_was_given(source: Path, tmp_path: Path) -> None:
    """The folder's manifest records it, so that `verify DIR SOURCE` needs no option."""
    api.convert(source, tmp_path / "out", image_size=70, image_mean=0.5)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.image_processor is not None
    assert manifest.image_processor.origin == "--image-mean and --image-size"
    assert manifest.image_processor.config == written(tmp_path / "out")
    found = api.verify(tmp_path / "out", source, device="cpu", parity=False)
    assert found.check("config").passed
    assert found.edited == ()
    check = found.check("preprocessing")
    assert check.passed
    assert check.proves.startswith("the saved image processor is the one that was given; with Pillow, it produces")
    text = json.dumps({**written(tmp_path / "out"), "image_mean": [0.25] * 3})
    (tmp_path / "out" / NAME).write_text(text)
    edited = api.verify(tmp_path / "out", source, device="cpu", parity=False)
    assert edited.edited == (NAME,)
    assert "image_mean is [0.25, 0.25, 0.25], not [0.5, 0.5, 0.5]" in edited.conclusion.details


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_std": "0.5,0,0.5"}, "--image-std '0.5,0,0.5' has a number that is not above 0"),
        ({"image_std": -1}, "--image-std -1 has a number that is not above 0"),
        ({"image_mean": "red"}, "--image-mean 'red' is not a list of numbers. Give one per channel, such as 0.5,0.5,0"),
        ({"image_mean": "nan"}, "--image-mean 'nan' is not a list of numbers"),
        ({"image_mean": ""}, "--image-mean '' is not a list of numbers"),
        ({"image_mean": [None]}, r"--image-mean \[None\] is not a list of numbers"),
        ({"image_mean": "123.7,116.3,103.5"}, "is for 0 to 255, divide it by 255"),
        ({"image_mean": "0.5,0.5"}, "image_mean has 2 numbers, but the model takes 3 channels. Give --image-mean and"),
        ({"image_size": 0}, "0 is not an image size"),
        ({"image_size": 14 * 10**9}, r"14000000000 is not an image size.* up to 4,096"),
        ({"image_size": 71}, "--image-size 71 does not divide into the model's patches. Give a multiple of 14"),
        ({"image_processor": "own.json", "image_mean": 0.5}, "Omit --image-mean, --image-std and --image-size"),
        ({"image_processor": "none.json"}, "The image processor cannot be read: .*none.json: there is no such file"),
        ({"image_processor": "text.json"}, "The image processor cannot be read: .*text.json is not valid JSON"),
        ({"image_processor": "list.json"}, "The image processor cannot be read: .*list.json is not a JSON object"),
        ({"image_processor": "config.json"}, "config.json is a model's config.json. Give a preprocessor_config.json"),
        ({"image_processor": "other.json"}, "other.json is without the steps of an image processor"),
        ({"image_processor": "two.json"}, "two.json: its image_mean has 2 numbers, but the model takes 3 channels"),
    ],
)  # fmt: skip
def test_each_mistake_gets_one_message(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    texts = {
        "own.json": json.dumps(OWN), "text.json": "mean=3", "list.json": "[]", "other.json": '{"a": 1}',
        "config.json": '{"model_type": "dinov2"}', "two.json": json.dumps({**OWN, "image_mean": [1, 2]}),
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    if "image_processor" in options:
        options = {**options, "image_processor": tmp_path / options["image_processor"]}
    with pytest.raises(UsageError, match=message):
        api.convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_size_of_an_unknown_processor_cannot_be_changed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({**OWN, "image_processor_type": "DPTImageProcessor"}))
    api.convert(source, tmp_path / "out", image_processor=tmp_path / "own.json")
    with pytest.raises(UsageError, match="--image-size cannot replace the steps of a DPTImageProcessor, which stream"):
        api.plan(tmp_path / "out", image_size=70)
    assert api.plan(tmp_path / "out", image_mean=0.5).image_processor_from == "user"


@pytest.mark.transformers
@pytest.mark.parametrize("channels", [1, 2, 12])
def test_processor_of_other_channels_works_with_tensors(tmp_path: Path, channels: int) -> None:
    source = saved(make_states(replace(tiny(), channels=channels))[0], tmp_path / "x.pth")
    std = [0.1 + 0.01 * i for i in range(channels)]
    done = api.convert(source, tmp_path / "out", image_mean=0.5, image_std=std, image_size=56)
    assert done.plan.pixel_steps is not None
    load: Any = AutoImageProcessor.from_pretrained
    image = torch.full((channels, 80, 60), 51, dtype=torch.uint8)
    pixels = load(tmp_path / "out")(image, return_tensors="pt")["pixel_values"]
    wanted = torch.tensor([(0.2 - 0.5) / each for each in std]).view(1, channels, 1, 1).expand(1, channels, 56, 56)
    assert torch.allclose(pixels, wanted, atol=1e-5)
    found = api.verify(tmp_path / "out", source, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").numbers["size"] == 56
    if channels > 1:
        with pytest.raises(UsageError, match=f"has 3 numbers, but the model takes {channels} channels"):
            api.plan(source, image_mean=0.5)


def test_family_without_an_image_processor_takes_none(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = replace(FAMILY, image_processor=None)
    for module in ("registry", "detection", "no_backbone"):
        monkeypatch.setattr(f"streamconv.families.{module}.all_families", lambda: (family,))
    with pytest.raises(UsageError, match=r"A dinov2 model has no image processor\. Omit --image-mean and --image-std"):
        streamconv.plan(source, ConversionOptions(image_mean=0.5, image_std=0.5))
