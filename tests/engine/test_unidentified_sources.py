"""Sources that only their bytes identify: they have no checksums, and their server reports no version."""

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem

import streamconv
from streamconv import ConversionOptions, OutputError, VerificationOptions
from streamconv.files.address import Address
from streamconv.files.base import UNVERSIONED
from streamconv.files.fsspec import FsspecFile
from tests import api
from tests.checkpoints import make_states
from tests.file_server import FileServer
from tests.support import Interrupted, contents, model_files, run, tiny

MODEL = tiny(layers=2, hidden=256)  # 6 MB


def without_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make memory:// like fsspec's http: it reports only the size of a file, and one key whatever the file contains."""
    real = MemoryFileSystem.info

    def info(self: Any, path: str, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in real(self, path, **kwargs).items() if name != "created"}

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    monkeypatch.setattr(MemoryFileSystem, "ukey", lambda self, path: path)


@pytest.fixture(params=["http", "fsspec"])
def source(request: pytest.FixtureRequest, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the address of a file that `put` has written."""
    monkeypatch.setattr("streamconv.output.writer.SYNC_BYTES", 1 << 20)
    server.faults.etag = server.faults.last_modified = False
    without_versions(monkeypatch)
    put(server)
    yield f"{server.url}/x.bin" if request.param == "http" else "memory://bucket/x.bin"
    MemoryFileSystem.store.clear()


def put(server: FileServer, seed: int = 0, *, is_legacy: bool = False) -> Path:
    path, state = server.folder / "x.bin", make_states(MODEL, seed)[0]
    if is_legacy:
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        safetensors.torch.save_file(state, path)
    MemoryFileSystem().pipe_file("/bucket/x.bin", path.read_bytes())
    return path


def stop_at_half(step: str, done: int, total: int, unit: str) -> None:
    if step.startswith("writing") and done > total // 2:
        raise Interrupted


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_legacy", [False, True])
def test_interrupted_conversion_ends_well_and_the_finished_one_is_recognised(
    server: FileServer, source: str, tmp_path: Path, stream: bool, is_legacy: bool
) -> None:
    path, out = put(server, is_legacy=is_legacy), tmp_path / "out"
    with pytest.raises(Interrupted):
        api.convert(source, out, stream=stream, progress=stop_at_half)
    done = api.convert(source, out, stream=stream)
    # A streamed file may be another one by now; a copy that was downloaded twice is known to have the same bytes.
    assert (done.resumed_bytes == 0) == stream
    assert model_files(out) == model_files(api.convert(path, tmp_path / "expected").output)
    before = contents(out)
    for again in (stream, not stream):
        assert api.convert(source, out, stream=again).was_finished
    assert contents(out) == before


@pytest.mark.parametrize("stream", [False, True])
def test_halves_of_two_files_are_never_combined_and_another_file_is_refused(
    server: FileServer, source: str, tmp_path: Path, stream: bool
) -> None:
    for size in ("5GB", "1MB"):  # with shards, some of the first file's are complete
        out = tmp_path / size
        put(server, seed=0)
        with pytest.raises(Interrupted):
            api.convert(source, out, stream=stream, max_shard_size=size, progress=stop_at_half)
        path = put(server, seed=1)
        if not stream:  # the copy's time tells that it is another file, which the user may not have expected
            with pytest.raises(OutputError, match="its backbone differs"):
                api.convert(source, out, max_shard_size=size)
        api.convert(source, out, stream=stream, max_shard_size=size, force=not stream)
        expected = api.convert(path, tmp_path / f"expected{size}", max_shard_size=size).output
        assert model_files(out) == model_files(expected)
        put(server, seed=2)
        with pytest.raises(OutputError, match="its backbone differs"):
            api.convert(source, out, stream=stream, max_shard_size=size)
        assert model_files(out) == model_files(expected)


def test_edits_are_kept_and_a_lost_file_is_written_again(source: str, tmp_path: Path) -> None:
    out = api.convert(source, tmp_path / "out", stream=True).output
    (out / "config.json").write_text(json.dumps({**json.loads((out / "config.json").read_text()), "mine": 1}))
    (out / "preprocessor_config.json").unlink()
    done = api.convert(source, out, stream=True)
    assert (done.edited, dict(done.restored)) == (("config.json",), {"preprocessor_config.json": "missing"})
    assert api.convert(source, out, stream=True).was_finished


def test_dry_run_notes_that_bytes_will_be_compared(source: str, tmp_path: Path) -> None:
    out = api.convert(source, tmp_path / "out", stream=True).output
    shown = run("convert", source, "-o", out, "--stream", "--dry-run", "--json", cwd=tmp_path)
    preview = json.loads(shown.stdout)
    assert preview["write"] == []
    assert "finished if the source has not changed: its server reports no version" in preview["notes"][-1]


@pytest.mark.parametrize("source", ["http"], indirect=True)
def test_run_twice_verifies_twice(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamconv.verification.process.WORKER", "tests.scripted_worker")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setenv("SCRIPT", "passes")
    options = ConversionOptions(stream=True), VerificationOptions(device="cpu")
    for is_second in (False, True):
        done = streamconv.run(source, tmp_path / "out", *options)
        assert (done.conversion.was_finished, done.passed) == (is_second, True)
        assert done.verification is not None
        assert not done.verification.not_recorded


def test_version_in_a_store_changes_with_the_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.bin").write_bytes(b"one")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.write(tmp_path / "x.bin", "x.bin")
    for address in (Address(f"local://{tmp_path}/x.bin"), Address(f"zip://x.bin::{tmp_path}/x.zip")):
        one, other = FsspecFile(address), FsspecFile(address)
        assert one.version == other.version
        assert one.version.keys() == {"key"}
    without_versions(monkeypatch)
    MemoryFileSystem().pipe_file("/x.bin", b"one")
    assert FsspecFile(Address("memory://x.bin")).version.keys() == {UNVERSIONED}
    MemoryFileSystem.store.clear()
