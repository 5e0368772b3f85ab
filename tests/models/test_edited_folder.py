"""Verification of a folder whose small files were edited after the conversion."""

import json
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv import Destination, OutputError, PushOptions
from tests import api
from tests.hub_server import HubServer
from tests.support import Save, problems, run, tiny, verdicts

PROCESSOR = "preprocessor_config.json"
PASSED = {"bytes": True, "config": True, "load": True, "parity": True, "preprocessing": True}


def edit(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def source(save: Save) -> Path:
    return save(tiny())[0]


@pytest.fixture
def folder(tmp_path: Path, source: Path) -> Path:
    return api.convert(source, tmp_path / "out", num_heads=2).output


def test_run_into_an_edited_folder_keeps_the_edit_and_names_it_in_the_last_line(
    tmp_path: Path, source: Path, folder: Path
) -> None:
    edit(folder / PROCESSOR, {"image_mean": [0.5, 0.5, 0.5]})
    edited = (folder / PROCESSOR).read_bytes()
    done = run("run", source, "-o", folder, "--num-heads", 2, "--device", "cpu", cwd=tmp_path, COLUMNS="400")
    assert done.returncode == 0
    assert (folder / PROCESSOR).read_bytes() == edited
    assert "nothing was changed" in done.stdout
    assert done.stdout.splitlines()[-1] == (
        f"Looks ok, but not everything was checked: {PROCESSOR} was edited after the conversion (image_mean is "
        "[0.5, 0.5, 0.5], not [0.485, 0.456, 0.406])."
    )
    assert "the saved image processor was edited after the conversion; with Pillow, it produces exactly" in done.stdout
    assert "exactly the original's pixels" not in done.stdout
    alone = run("verify", folder, cwd=tmp_path, COLUMNS="400")
    assert alone.returncode == 0
    assert alone.stdout.splitlines()[-1] == (
        f"Files unchanged since they were verified ({PROCESSOR} had been edited); not compared with a source."
    )
    edit(folder / PROCESSOR, {"image_mean": [0.4, 0.5, 0.5]})  # not verified yet
    found = api.verify(folder)
    assert found.passed is False
    assert f"If you edited {PROCESSOR} yourself, verify it against the source" in found.conclusion.details


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("config.json", {"problem_type": "regression"}, 'problem_type is "regression", not absent'),
        ("config.json", {"drop_path_rate": 0.1}, "drop_path_rate is 0.1, not 0.0"),
        (PROCESSOR, {"crop_size": {"height": 56, "width": 56}}, "crop_size.height is 56, not 224"),
        (PROCESSOR, {"mine": 1}, "mine is 1, not absent"),
    ],
)
def test_edits_that_are_the_users_decision_are_named_and_pass(
    source: Path, folder: Path, name: str, values: dict[str, Any], found: str
) -> None:
    edit(folder / name, values)
    verified = api.verify(folder, source, device="cpu")
    assert verdicts(verified) == PASSED
    assert verified.edited == (name,)
    assert verified.conclusion.kind == "incomplete"
    assert f"{name} was edited after the conversion (" in verified.conclusion.details
    assert found in verified.conclusion.details


def test_reformatted_files_are_no_edits_of_values(source: Path, folder: Path) -> None:
    edit(folder / "config.json", {})
    edit(folder / PROCESSOR, {})
    verified = api.verify(folder, source, device="cpu", num_heads=2)
    assert (verified.edited, verified.conclusion.title) == (("config.json", PROCESSOR), "Looks ok!")
    assert verified.check("preprocessing").proves.startswith(
        "with Pillow, the saved image processor produces exactly the original's pixels"
    )
    assert api.verify(folder).passed


@pytest.mark.parametrize(
    ("values", "failed"),
    [
        ({"num_attention_heads": 4}, {"config", "parity"}),
        ({"layer_norm_eps": 1e-3}, {"config", "parity"}),
        ({"hidden_size": 256}, {"config", "load"}),
        ({"dtype": "float16"}, {"bytes"}),
        ({"quantization_config": {}}, {"config"}),
        ({"transformers_weights": "other.safetensors"}, {"config"}),
    ],
)
def test_edits_that_contradict_the_weights_fail(
    source: Path, folder: Path, values: dict[str, Any], failed: set[str]
) -> None:
    edit(folder / "config.json", values)
    verified = api.verify(folder, source, device="cpu")
    assert failed <= {name for name, passed in verdicts(verified).items() if passed is False}
    assert "config" not in failed or "changed after the conversion: config.json" in problems(verified)
    assert not api.verify(folder, source, device="cpu", parity=False).passed


@pytest.mark.parametrize("name", [PROCESSOR, "generation_config.json"])
def test_file_that_is_too_large_for_any_model_is_not_given_to_transformers(
    source: Path, folder: Path, name: str
) -> None:
    with open(folder / name, "ab") as file:
        file.truncate(2 << 30)  # sparse: reading it would take 4.9 GB of memory
    verified = api.verify(folder, source, device="cpu")
    assert f"{name} has 2,147,483,648 bytes" in problems(verified)
    assert verified.check("load").passed is False
    assert verified.check("parity").passed is verified.check("preprocessing").passed is None


def test_steps_that_are_not_compared_are_named(source: Path, folder: Path) -> None:
    edit(folder / PROCESSOR, {"keep_aspect_ratio": True})
    verified = api.verify(folder, source, device="cpu")
    assert verdicts(verified) == PASSED
    assert "keep_aspect_ratio is true, not absent" in verified.conclusion.details
    assert "the image processor's pixels were not compared" in verified.conclusion.details


@pytest.mark.parametrize("text", ["{", "[1]", '{"image_processor_type": "NoSuchProcessor"}'])
def test_image_processor_that_does_not_load_fails(source: Path, folder: Path, text: str) -> None:
    (folder / PROCESSOR).write_text(text)
    assert not api.verify(folder, source, device="cpu").passed


def test_edited_labels_are_named_and_predicted(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=3))
    out = api.convert(backbone, tmp_path / "out", head=head).output
    edit(out / "config.json", {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}})
    for verified in (
        api.verify(out, backbone, head=head, device="cpu"),
        streamconv.run(
            backbone, out, streamconv.ConversionOptions(head=head), streamconv.VerificationOptions(device="cpu")
        ).verification,
    ):
        assert verified is not None
        assert verified.passed
        assert "config.json was edited after the conversion (" in verified.conclusion.details
        assert {label for label, _ in verified.predictions} == {"a", "b", "c"}


@pytest.mark.transformers
def test_edited_folder_is_published_once_it_was_verified(hub: HubServer, source: Path, folder: Path) -> None:
    api.verify(folder, source, device="cpu")
    edit(folder / PROCESSOR, {"image_mean": [0.5, 0.5, 0.5]})
    push = PushOptions(Destination("it"))
    with pytest.raises(OutputError, match=rf"{PROCESSOR} was changed after .* Verify the folder again, which records"):
        streamconv.publish(folder, push)
    assert api.verify(folder, source, device="cpu").passed
    streamconv.publish(folder, push)
    arrived = hub.files("ada/it")
    assert arrived[PROCESSOR] == (folder / PROCESSOR).read_bytes()
    assert "Edited after the conversion: `preprocessor_config.json`" in arrived["README.md"].decode()
    assert "image_mean is" in arrived["README.md"].decode()
