"""Verification of a source that is kept nowhere: what it finds, what it reads, and what it says it did not check."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import CorruptError
from streamconv.files import remote
from tests.conftest import make_states, run_python, tiny
from tests.engine.test_cli import run
from tests.file_server import FileServer
from tests.models.test_verify import alter, problems, verdicts

MODEL = tiny(swiglu=True, hidden=256)


@pytest.fixture
def source(server: FileServer, tmp_path: Path) -> str:
    torch.save(make_states(MODEL)[0], server.folder / "x.pth")
    streamconv.convert(f"{server.url}/x.pth", tmp_path / "out", stream=True)
    return f"{server.url}/x.pth"


def test_parity_reads_the_weights_a_second_time_and_no_third(server: FileServer, source: str, tmp_path: Path) -> None:
    server.sent = 0
    found = streamconv.verify(tmp_path / "out", source, device="cpu", stream=True)
    assert verdicts(found) == {"bytes": True, "load": True, "parity": True, "preprocessing": True}
    assert found.checks[2].numbers["largest"] <= found.checks[2].numbers["tolerance"]
    passes = 2 if "float32" in found.checks[2].numbers else 1  # in float64 once more, where float32 rounds otherwise
    size = (server.folder / "x.pth").stat().st_size
    assert server.sent < (passes + 0.5) * size + 2 * remote.WINDOW_BYTES
    assert found.checks[0].not_checked == "the source's bytes were not read again"
    assert found.checks[3].not_checked == "no model ran at 224x224"
    assert not (tmp_path / "torch").exists()


def test_without_parity_no_weight_is_read_and_it_is_said(server: FileServer, source: str, tmp_path: Path) -> None:
    server.sent = 0
    done = run("verify", "out", source, "--stream", "--no-parity", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert server.sent < 3 * remote.WINDOW_BYTES
    assert "parity        not run: --no-parity" in done.stdout
    left = "the source's bytes were not read again; parity did not run; no model ran at 224x224"
    assert done.stdout.splitlines()[-1] == f"Looks ok, but not everything was checked: {left}."


def test_without_parity_a_file_is_compared_still(source: str, server: FileServer, tmp_path: Path) -> None:
    found = streamconv.verify(tmp_path / "out", server.folder / "x.pth", device="cpu", parity=False)
    assert verdicts(found) == {"bytes": True, "load": True, "parity": None, "preprocessing": True}
    alter(tmp_path / "out", lambda state: state["layernorm.bias"].mul_(2))
    found = streamconv.verify(tmp_path / "out", server.folder / "x.pth", device="cpu", parity=False)
    assert "layernorm.bias differs from its source" in problems(found)


def test_a_flipped_bit_of_the_output_is_found(source: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    found = streamconv.verify(tmp_path / "out", source, device="cpu", stream=True, parity=False)
    assert "model.safetensors is not as it was written" in problems(found)


def test_a_wrong_output_with_a_manifest_to_match_is_found_by_parity(source: str, tmp_path: Path) -> None:
    """What the manifest vouches for is only that the files are as they were written; the models say what they do."""
    alter(tmp_path / "out", lambda state: state["encoder.layer.1.norm1.weight"].mul_(1.5))
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_text())
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    (tmp_path / "out" / "streamconv.json").write_text(json.dumps(manifest))
    found = streamconv.verify(tmp_path / "out", source, device="cpu", stream=True)
    assert verdicts(found)["bytes"] is True
    assert "the first difference is in layer 1" in problems(found)


@pytest.mark.parametrize("change", ["missing", "config", "dtype"])
def test_what_the_plan_does_not_say_is_found(source: str, tmp_path: Path, change: str) -> None:
    """Although the manifest was made to match."""
    folder = tmp_path / "out"
    if change == "missing":
        alter(folder, lambda state: state.pop("embeddings.mask_token"))
    elif change == "dtype":
        alter(folder, lambda state: state.update({k: state[k].double() for k in ["embeddings.mask_token"]}))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-5}))
    manifest = json.loads((folder / "streamconv.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    (folder / "streamconv.json").write_text(json.dumps(manifest))
    found = streamconv.verify(folder, source, device="cpu", stream=True, parity=False)
    told = {"missing": "mask_token is missing", "dtype": "mask_token is F64", "config": "layer_norm_eps"}
    assert told[change] in "\n".join(found.checks[0].problems)


def test_a_folder_without_a_manifest_is_compared_byte_by_byte_over_the_line(
    server: FileServer, source: str, tmp_path: Path
) -> None:
    (tmp_path / "out" / "streamconv.json").unlink()
    found = streamconv.verify(tmp_path / "out", source, device="cpu", stream=True, parity=False)
    assert found.checks[0].proves.startswith("every byte of every tensor equals its source's")
    assert found.passed
    server.sent = 0
    alter(tmp_path / "out", lambda state: state["layernorm.bias"].mul_(2))
    found = streamconv.verify(tmp_path / "out", source, device="cpu", stream=True, parity=False)
    assert "layernorm.bias differs from its source" in problems(found)
    assert server.sent < 1.1 * (server.folder / "x.pth").stat().st_size + 3 * remote.WINDOW_BYTES


def test_weights_that_come_damaged_are_no_verdict(server: FileServer, source: str, tmp_path: Path) -> None:
    path = server.folder / "x.pth"
    state, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CorruptError, match="does not match its CRC-32"):
        streamconv.verify(tmp_path / "out", source, device="cpu", stream=True)


def test_an_address_without_stream_is_downloaded_and_compared(server: FileServer, source: str, tmp_path: Path) -> None:
    found = streamconv.verify(tmp_path / "out", source, device="cpu")
    assert found.passed
    assert found.checks[0].proves.startswith("every byte of every tensor equals its source's")
    assert (tmp_path / "torch" / "hub" / "checkpoints" / "x.pth").exists()


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_classifier_is_streamed_from_two_addresses(server: FileServer, tmp_path: Path, kind: str) -> None:
    for name, state in zip(("b", "h"), make_states(tiny(classes=5)), strict=True):
        save: Callable[..., None] = torch.save if kind == "pth" else safetensors.torch.save_file
        save(state, server.folder / f"{name}.{kind}")
    backbone, head = f"{server.url}/b.{kind}", f"{server.url}/h.{kind}"
    streamconv.convert(backbone, tmp_path / "out", head=head, stream=True)
    found = streamconv.verify(tmp_path / "out", backbone, head=head, device="cpu", stream=True)
    assert verdicts(found) == {"bytes": True, "load": True, "parity": True, "preprocessing": True}
    # Where nothing was checked while it was copied, it is compared now.
    assert ("equals its source's" in found.checks[0].proves) == (kind == "safetensors")
    assert len(found.predictions) == 5


def test_the_whole_job_on_the_command_line(server: FileServer, source: str, tmp_path: Path) -> None:
    done = run("run", source, "-o", "other", "--stream", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Looks ok, but not everything was checked: the source's bytes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "served"]


def test_memory_does_not_grow_with_the_model(server: FileServer, tmp_path: Path) -> None:
    """The original's weights are read into memory that is given back, layer by layer."""
    peaks = []
    code = "import streamconv, json; found = streamconv.verify({!r}, {!r}, device='cpu', stream=True);"
    code += "print(json.dumps(dict(found.memory)))"
    for name, layers in (("small", 4), ("large", 28)):
        torch.save(make_states(tiny(layers=layers, hidden=512))[0], server.folder / f"{name}.pth")
        place = f"{server.url}/{name}.pth"
        streamconv.convert(place, tmp_path / name, stream=True)
        peaks.append(json.loads(run_python(code.format(str(tmp_path / name), place)).splitlines()[-1]))
    grown = [peak["host_anonymous_peak"] - peak["host_anonymous_start"] for peak in peaks]
    assert grown[1] - grown[0] < 48 << 20, peaks
