"""Views that repeat their data: a small file can describe a large model."""

import json
from pathlib import Path

import click
import pytest
import torch

import streamconv
from streamconv import ConversionOptions
from streamconv.cli import consent
from streamconv.errors import RepeatedDataError
from streamconv.families.dinov2 import FAMILY
from streamconv.families.dinov2_geometry import Dimensions
from streamconv.families.registry import find_model
from streamconv.planning import repeats
from streamconv.planning.plan_json import from_json, to_json
from tests import api
from tests.checkpoints import make_states
from tests.hostile import Attacked, Refusal
from tests.support import model_files, run, tiny


def save_expanded(path: Path, dimensions: Dimensions) -> Path:
    """Save a checkpoint in which each tensor is one number, repeated."""
    infos = FAMILY.sources(dimensions)
    torch.save({name: torch.full((), float(i)).expand(infos[name].shape) for i, name in enumerate(infos)}, path)
    return path


@pytest.fixture
def repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tiny checkpoint of repeated numbers, and let no repetition be too small to be asked about."""
    monkeypatch.setattr(repeats, "_MAX_BYTES", 0)
    return save_expanded(tmp_path / "x.pth", tiny())


def test_small_file_of_a_large_model_is_reported_and_refused(
    tmp_path: Path, refusal: Refusal, attacked: Attacked
) -> None:
    _, model = find_model("dinov2_vitg14")
    path = save_expanded(tmp_path / "x.pth", model.dimensions)
    assert path.stat().st_size < 500_000
    note = "the source repeats its data: 2,"
    text = attacked.run("plan", path)
    planned = attacked.run("plan", path, "--json").document
    assert text.code == 0
    assert note in text.stdout
    assert planned["bytes"] > 4_000_000_000
    assert planned["source_bytes"] < 10_000
    assert planned["notes"][-1].startswith(note)
    for options in ((), ("--dry-run",)):
        message = refusal(path, *options)
        assert message.startswith(note.capitalize())
        assert "--yes" in message


def test_ordinary_repetition_passes_silently(tmp_path: Path) -> None:
    plan = api.plan(save_expanded(tmp_path / "x.pth", tiny()))
    assert not any("repeats" in note for note in plan.notes)
    assert plan.source_bytes < plan.weights
    assert api.convert(tmp_path / "x.pth", tmp_path / "out").output.exists()


def test_overlaps_count_once_and_casts_do_not_count(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    weights = sum(tensor.nbytes for tensor in state.values())
    state["norm.weight"] = state["norm.bias"]
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pth")
    torch.save(state, tmp_path / "x.pth")
    assert api.plan(tmp_path / "x.pth").source_bytes in range(weights - 8_000, weights)
    plan = api.plan(tmp_path / "half.pth", dtype="float32")
    assert plan.source_bytes < plan.weights / 2 + 8_000


def test_repetition_is_written_once_it_is_allowed(repeated: Path, tmp_path: Path) -> None:
    plan = api.plan(repeated)
    assert from_json(to_json(plan)).source_bytes == plan.source_bytes
    with pytest.raises(RepeatedDataError, match="allow_repeats"):
        streamconv.convert(repeated, tmp_path / "out")
    with pytest.raises(RepeatedDataError):
        streamconv.run(repeated, tmp_path / "out", verification=None)
    assert not (tmp_path / "out").exists()
    streamconv.convert(repeated, tmp_path / "out", ConversionOptions(allow_repeats=True))
    loaded = torch.load(repeated, weights_only=True)
    torch.save({name: tensor.contiguous() for name, tensor in loaded.items()}, tmp_path / "whole.pth")
    api.convert(tmp_path / "whole.pth", tmp_path / "whole")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")


@pytest.mark.parametrize("command", [["convert"], ["run", "--no-verify"]])
def test_answer_in_a_terminal_decides(
    repeated: Path, tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(question: str, err: bool) -> bool:
        asked.append(question)
        return len(asked) == 2

    monkeypatch.setattr(consent, "can_ask", lambda: True)
    monkeypatch.setattr(click, "confirm", answer)
    words = [*command, repeated, "-o", "out"]
    assert json.loads(run(*words, "--json", cwd=tmp_path).stdout)["error"]["type"] == "RepeatedDataError"
    assert not asked
    assert run(*words, cwd=tmp_path).returncode == 3
    assert not (tmp_path / "out").exists()
    assert run(*words, cwd=tmp_path).returncode == 0
    assert len(asked) == 2
    assert asked[0].startswith("The source repeats its data: ")
    assert run(*command, repeated, "-o", "other", "--yes", cwd=tmp_path).returncode == 0
    assert len(asked) == 2
