"""Models are also known by their names on the Hub, which are those of the folders that they are converted into."""

import json
from pathlib import Path

import pytest

import streamconv
from streamconv import ConversionOptions, SourceMissingError, UsageError
from tests import api
from tests.support import Save, run, tiny


def test_folder_of_a_models_name_is_converted_and_the_note_says_so(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    api.convert(save(tiny())[0], "dinov2-small")
    done = run("convert", "dinov2-small", "-o", "out", "--dtype", "bf16", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    note = "dinov2-small is a path here; a model is published under this name, too"
    assert note in json.loads(done.stdout)["notes"]
    assert note in run("plan", "dinov2-small", cwd=tmp_path).stdout
    assert "dtype" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any(note in each for each in streamconv.plan("./dinov2-small").notes)
    with pytest.raises(UsageError, match="needs a name"):
        streamconv.convert("./dinov2-small")


def test_synthetic_model_is_named_by_its_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = streamconv.run("facebook/dinov2-small", verification=None, synthetic_seed=0)
    assert done.conversion.output == Path("dinov2-small")
    manifest = json.loads((tmp_path / "dinov2-small" / "streamconv.json").read_text())
    assert manifest["source"]["backbone"]["file"] == "dinov2_vits14_synthetic_seed0.pth"
    again = streamconv.run("dinov2-small", verification=None, synthetic_seed=0)  # the folder exists now
    assert again.conversion.was_finished


def test_interrupted_conversion_of_a_model_is_repeated_by_its_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unfinished folder of that name is the output, not the source."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    streamconv.synth("dinov2_vits14", cache / "dinov2_vits14_pretrain.pth")
    (tmp_path / "dinov2-small").mkdir()
    done = streamconv.convert("dinov2-small")
    assert (done.output, done.plan.title) == (Path("dinov2-small"), "dinov2_vits14")
    assert streamconv.convert("facebook/dinov2-small").was_finished
    assert streamconv.convert("dinov2-small", options=ConversionOptions(max_shard_size="5GB")).was_finished
    dry = json.loads(run("run", "dinov2-small", "--dry-run", "--no-verify", "--json", cwd=tmp_path).stdout)
    assert (dry["model"], dry["write"]) == ("dinov2_vits14", [])
    verified = api.verify("dinov2-small", "dinov2-small", parity=False)
    assert verified.source["backbone"].file == "dinov2_vits14_pretrain.pth"
    with pytest.raises(SourceMissingError):
        streamconv.convert("facebook/dinov2-tiny")
