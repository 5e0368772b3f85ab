"""Verification of a streamed source: the differences that it finds, its reads, and the checks that it skips."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch

from streamconv import CorruptError
from streamconv.files import remote
from tests import api
from tests.checkpoints import alter, make_states
from tests.file_server import FileServer
from tests.support import problems, run, run_process, tiny, verdicts

MODEL = tiny(swiglu=True, hidden=256)


@pytest.fixture
def source(server: FileServer, tmp_path: Path) -> str:
    torch.save(make_states(MODEL)[0], server.folder / "x.pth")
    api.convert(f"{server.url}/x.pth", tmp_path / "out", stream=True)
    return f"{server.url}/x.pth"


def test_parity_reads_the_weights_once_more(server: FileServer, source: str, tmp_path: Path) -> None:
    server.sent = 0
    found = api.verify(tmp_path / "out", source, device="cpu", stream=True)
    assert verdicts(found) == {"bytes": True, "config": True, "load": True, "parity": True, "preprocessing": True}
    assert found.check("parity").numbers["largest"] <= found.check("parity").numbers["tolerance"]
    passes = (
        2 if "float32" in found.check("parity").numbers else 1
    )  # once more in float64, if float32 rounds differently
    size = (server.folder / "x.pth").stat().st_size
    assert server.sent < (passes + 0.5) * size + 2 * remote.WINDOW_BYTES
    assert found.check("bytes").not_checked == "the source's bytes were not read again"
    assert "as_published" not in found.check("parity").numbers  # it would read the weights again
    assert not [*(tmp_path / "torch").rglob("*.pth")]


def test_without_parity_no_weights_are_read_and_that_is_reported(
    server: FileServer, source: str, tmp_path: Path
) -> None:
    server.sent = 0
    given = f"{source.replace('://', '://s0meone:p4ssword@')}?sig=s1gn4ture"
    words = ("--stream", "--no-parity", "--device", "cpu", "--report", "report.html", "-vv")
    done = run("verify", "out", given, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr, (tmp_path / "report.html").read_text()):
        assert not any(secret in text for secret in ("s0meone", "p4ssword", "s1gn4ture"))
    assert server.sent < 3 * remote.WINDOW_BYTES
    assert "parity        not run: --no-parity" in done.stdout
    left = "the source's bytes were not read again; the parity check did not run"
    assert done.stdout.splitlines()[-2:] == [
        f"Looks ok, but not everything was checked: {left}.",
        "report: report.html",
    ]


def test_without_parity_a_local_file_is_still_compared(source: str, server: FileServer, tmp_path: Path) -> None:
    found = api.verify(tmp_path / "out", server.folder / "x.pth", device="cpu", parity=False)
    assert verdicts(found) == {"bytes": True, "config": True, "load": True, "parity": None, "preprocessing": True}
    alter(tmp_path / "out", lambda state: state["layernorm.bias"].mul_(2))
    found = api.verify(tmp_path / "out", server.folder / "x.pth", device="cpu", parity=False)
    assert "layernorm.bias differs from its source" in problems(found)


def test_flipped_bit_in_the_output_is_found_without_reading_the_source(source: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    found = api.verify(tmp_path / "out", source, device="cpu", stream=True, parity=False)
    assert "model.safetensors has changed since it was written" in problems(found)


def test_wrong_output_with_a_matching_manifest_fails_parity(source: str, tmp_path: Path) -> None:
    """The bytes check, too: this machine has written no such files, so it reads the source's bytes."""
    alter(tmp_path / "out", lambda state: state["encoder.layer.1.norm1.weight"].mul_(1.5))
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_text())
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    (tmp_path / "out" / "streamconv.json").write_text(json.dumps(manifest))
    found = api.verify(tmp_path / "out", source, device="cpu", stream=True)
    assert verdicts(found)["bytes"] is False
    assert "the first difference is in layer 1" in problems(found)


@pytest.mark.parametrize("change", ["missing", "config", "dtype"])
def test_output_that_contradicts_the_plan_is_found(source: str, tmp_path: Path, change: str) -> None:
    """This holds even if the manifest was changed to match."""
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
    found = api.verify(folder, source, device="cpu", stream=True, parity=False)
    expected = {"missing": "mask_token is missing", "dtype": "mask_token is F64", "config": "layer_norm_eps"}
    check = found.check("config" if change == "config" else "bytes")
    assert expected[change] in "\n".join(check.problems)


def test_folder_without_a_manifest_is_compared_with_the_remote_bytes(
    server: FileServer, source: str, tmp_path: Path
) -> None:
    (tmp_path / "out" / "streamconv.json").unlink()
    found = api.verify(tmp_path / "out", source, device="cpu", stream=True, parity=False)
    assert found.check("bytes").proves.startswith("every byte of every tensor equals its source's")
    assert found.passed
    server.sent = 0
    alter(tmp_path / "out", lambda state: state["layernorm.bias"].mul_(2))
    found = api.verify(tmp_path / "out", source, device="cpu", stream=True, parity=False)
    assert "layernorm.bias differs from its source" in problems(found)
    assert server.sent < 1.1 * (server.folder / "x.pth").stat().st_size + 3 * remote.WINDOW_BYTES


def test_damaged_transfer_is_not_a_verdict(server: FileServer, source: str, tmp_path: Path) -> None:
    path = server.folder / "x.pth"
    state, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CorruptError, match="does not match its CRC-32"):
        api.verify(tmp_path / "out", source, device="cpu", stream=True)


def test_address_without_stream_is_downloaded_and_compared(server: FileServer, source: str, tmp_path: Path) -> None:
    found = api.verify(tmp_path / "out", source, device="cpu")
    assert found.passed
    assert found.check("bytes").proves.startswith("every byte of every tensor equals its source's")
    assert list((tmp_path / "torch" / "hub" / "checkpoints").rglob("x.pth"))


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_classifier_is_streamed_from_two_addresses(server: FileServer, tmp_path: Path, kind: str) -> None:
    for name, state in zip(("b", "h"), make_states(tiny(classes=5)), strict=True):
        save: Callable[..., None] = torch.save if kind == "pth" else safetensors.torch.save_file
        save(state, server.folder / f"{name}.{kind}")
    backbone, head = f"{server.url}/b.{kind}", f"{server.url}/h.{kind}"
    api.convert(backbone, tmp_path / "out", head=head, stream=True)
    found = api.verify(tmp_path / "out", backbone, head=head, device="cpu", stream=True)
    assert verdicts(found) == {"bytes": True, "config": True, "load": True, "parity": True, "preprocessing": True}
    # A source that could not be checked while it was copied is compared now.
    assert ("equals its source's" in found.check("bytes").proves) == (kind == "safetensors")
    assert len(found.predictions) == 5


def test_run_streams_and_verifies(server: FileServer, source: str, tmp_path: Path) -> None:
    done = run("run", source, "-o", "other", "--stream", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Looks ok, but not everything was checked: the source's bytes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "served", "torch"]
    assert not [*(tmp_path / "torch").rglob("*.pth")]


def test_file_whose_server_names_no_version_is_verified(server: FileServer, tmp_path: Path) -> None:
    """The models' process opens the file again, and has nothing to recognise it by."""
    server.faults.etag = server.faults.last_modified = False
    safetensors.torch.save_file(make_states(MODEL)[0], server.folder / "x.safetensors")
    words = ("run", f"{server.url}/x.safetensors", "-o", "out", "--stream", "--device", "cpu")
    done = run_process(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "parity        ok" in done.stdout
