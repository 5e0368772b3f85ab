"""The Python in README.md runs as it is, on a small model, and is typed; its commands print what it shows."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import streamconv
from tests import api
from tests.support import ROOT, Save, run, tiny


@pytest.fixture
def load_code() -> str:
    return _block("AutoModel")


@pytest.fixture
def library_code() -> str:
    return _block("streamconv.Cancelled")


def _blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _block(word: str) -> str:
    (found,) = (block for block in _blocks("python") if word in block)
    return found


def test_the_result_is_loaded_as_the_readme_shows(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, load_code: str
) -> None:
    backbone, _ = save(tiny())
    monkeypatch.chdir(tmp_path)
    api.convert(backbone, "dinov2-small")
    names: dict[str, Any] = {"image": Image.new("RGB", (300, 200), "green")}
    exec(load_code, names)
    assert names["features"].shape == (1, 1 + 16 * 16, 128)  # the CLS token, and the patches of 224 x 224 pixels


def test_the_library_is_used_as_the_readme_shows(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], library_code: str
) -> None:
    save(tiny(), "mine")
    monkeypatch.chdir(tmp_path)
    exec(library_code, {"__name__": "readme"})
    assert capsys.readouterr().out == "True\nF32 [1, 17, 128]\n"


def test_the_readmes_example_can_be_cancelled(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, library_code: str
) -> None:
    save(tiny(), "mine")
    monkeypatch.chdir(tmp_path)
    line = "stop = threading.Event()"
    assert line in library_code
    with pytest.raises(Exception, match="cancelled"):
        exec(library_code.replace(line, f"{line}; stop.set()"), {"__name__": "readme"})
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_readmes_library_code_passes_mypy_strict(tmp_path: Path, library_code: str) -> None:
    (tmp_path / "readme.py").write_text(library_code)
    command = [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "readme.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={"PATH": ""}
    )  # with mypy's cache there
    assert done.returncode == 0, done.stdout


def _save_training_checkpoint(path: Path) -> None:
    """Save what training leaves: a teacher with a head, and an optimizer."""
    streamconv.synth("dinov2_vits14", path)
    backbone = torch.load(path, weights_only=True)
    head = {"mlp.0.weight": torch.zeros(2048, 384), "last_layer.weight_v": torch.zeros(8192, 256)}
    teacher = {f"backbone.{key}": value for key, value in backbone.items()}
    teacher |= {f"dino_head.{key}": value for key, value in head.items()}
    torch.save({"teacher": teacher, "optimizer": {"exp_avg": torch.zeros(3, 384)}, "iteration": 125_000}, path)


def _comparable(text: str) -> str:
    """Return the text without what differs from run to run, and from one width of a terminal to another."""
    text = re.sub(r"\d[\d.,]* (min \d+ s|s|[GM]B/s|MB (?:peak|of it))\b", r"N \1", text)
    return " ".join(text.split())


@pytest.mark.slow
def test_the_commands_print_what_the_readme_shows(tmp_path: Path) -> None:
    """The README leaves out parts of the output, and shows … instead."""
    _save_training_checkpoint(tmp_path / "teacher_checkpoint.pth")
    blocks, differing = _blocks("console"), []
    assert len(blocks) == 2
    for block in blocks:
        line, _, shown = block.partition("\n")
        done = run(*shlex.split(line.removeprefix("$ streamconv")), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        pattern = ".*".join(re.escape(part.strip()) for part in _comparable(shown).split("…"))
        if not re.fullmatch(pattern, _comparable(done.stdout)):
            differing.append(f"{line}\n{done.stdout}")
    assert not differing, "README.md should show:\n" + "\n".join(differing)
