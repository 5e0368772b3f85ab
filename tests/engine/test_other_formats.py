"""Files that torch writes and that are no state dict: each message names what they are, and its advice works."""

import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import streamconv
from streamconv import SourceError
from streamconv.tensors.evaluation import read_bytes
from tests.checkpoints import bytes_of

MODEL = torch.nn.Sequential(torch.nn.Linear(4, 3))
STATE = MODEL.state_dict()


def message_of(place: Path) -> str:
    with pytest.raises(SourceError) as caught:
        streamconv.open_checkpoint(place)
    return str(caught.value)


def require_read(path: Path, prefix: str = "") -> None:
    with streamconv.open_checkpoint(path) as checkpoint:
        assert {name: read_bytes(tensor) for name, tensor in checkpoint.items()} == {
            prefix + name: bytes_of(value) for name, value in STATE.items()
        }


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(1, 4))])
@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_named(tmp_path: Path, make: Callable[[torch.nn.Module], torch.jit.ScriptModule]) -> None:
    make(MODEL).save(str(tmp_path / "x.pt"))
    assert "is a TorchScript program." in message_of(tmp_path / "x.pt")
    assert "torch.save(torch.jit.load(FILE).state_dict(), OUT)" in message_of(tmp_path / "x.pt")
    torch.save(torch.jit.load(tmp_path / "x.pt").state_dict(), tmp_path / "out.pth")
    require_read(tmp_path / "out.pth")


@pytest.mark.filterwarnings("ignore")
def test_exported_program_is_named(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(MODEL, (torch.zeros(1, 4),)), tmp_path / "x.pt2")
    assert "torch.save(torch.export.load(FILE).state_dict, OUT)" in message_of(tmp_path / "x.pt2")
    torch.save(torch.export.load(tmp_path / "x.pt2").state_dict, tmp_path / "out.pth")
    require_read(tmp_path / "out.pth")


@pytest.mark.filterwarnings("ignore")
def test_package_is_named(tmp_path: Path) -> None:
    with torch.package.PackageExporter(tmp_path / "x.pt") as exporter:
        exporter.extern("torch.**")
        exporter.save_pickle("model", "model.pkl", MODEL)
    assert "was written by torch.package" in message_of(tmp_path / "x.pt")


@pytest.mark.parametrize("is_split", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoint_is_named(tmp_path: Path, is_split: bool) -> None:
    dcp.save({"model": dict(STATE), "step": 3}, checkpoint_id=tmp_path / "ckpt" / "5", no_dist=True)
    for place in (tmp_path / "ckpt", tmp_path / "ckpt" / "5"):
        advice = f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {tmp_path}/ckpt/5 OUT.pth`"
        assert advice in message_of(place)
    assert "dcp_to_torch FOLDER OUT.pth" in message_of(tmp_path / "ckpt" / "5" / "__0_0.distcp")
    dcp_to_torch_save(tmp_path / "ckpt" / "5", tmp_path / "out.pth")
    require_read(tmp_path / "out.pth", "model.")


def test_unpacked_checkpoint_is_packed_again_by_the_advice(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        archive.extractall(tmp_path / "some place")
    (tmp_path / "x.pth").rename(tmp_path / "kept.pth")
    folder = tmp_path / "some place" / "x"
    command = message_of(folder).split("`")[1]
    assert message_of(folder.parent).split("`")[1] == command
    assert command == f"cd '{tmp_path}/some place' && zip -0 -r -D OUT.pth x"
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    require_read(tmp_path / "some place" / "OUT.pth")


@pytest.mark.parametrize("options", ["-6", "-0"])
def test_checkpoint_that_was_packed_again_is_saved_again_by_the_advice(tmp_path: Path, options: str) -> None:
    """Compressed, or stored with entries for folders, which torch loads but cannot map."""
    torch.save(STATE, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        archive.extractall(tmp_path)
    subprocess.run(["zip", "-q", options, "-r", "again.pth", "x"], cwd=tmp_path, check=True)
    assert "torch.save(torch.load(FILE, weights_only=True), OUT)" in message_of(tmp_path / "again.pth")
    torch.save(torch.load(tmp_path / "again.pth", weights_only=True), tmp_path / "out.pth")
    require_read(tmp_path / "out.pth")


def test_encrypted_zip_is_named(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pth")
    subprocess.run(["zip", "-q", "-P", "secret", "x.zip", "x.pth"], cwd=tmp_path, check=True)
    assert "is a zip that contains x.pth. Unpack it with `unzip`" in message_of(tmp_path / "x.zip")
    os.unlink(tmp_path / "x.pth")
    subprocess.run(["unzip", "-q", "-P", "secret", "x.zip"], cwd=tmp_path, check=True)
    require_read(tmp_path / "x.pth")
