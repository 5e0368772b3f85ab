"""Downloads into torch.hub's cache: complete or absent, resumed, and never mistaken for another file."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from streamconv import ConversionOptions, CorruptError, NetworkError, OutputError, SourceError
from streamconv.families import dinov2
from streamconv.families.base import RemoteFile
from streamconv.files import remote
from streamconv.jobs.preview import preview
from streamconv.output.journal import Journal
from tests import api
from tests.checkpoints import make_states
from tests.file_server import FileServer
from tests.support import interrupt_after, tiny

MODEL = tiny(layers=3, hidden=512)  # 38 MB


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamconv.output.writer.SYNC_BYTES", 2 << 20)
    monkeypatch.setattr(remote.RemoteFile, "request_bytes", 1 << 20)


@pytest.fixture
def cache(server: FileServer, tmp_path: Path) -> Path:
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def source(server: FileServer, cache: Path) -> str:
    torch.save(make_states(MODEL)[0], server.folder / "x.pth")
    return f"{server.url}/x.pth"


def test_address_is_downloaded_once_and_converted_from_the_cache(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    api.convert(source, tmp_path / "out")
    assert [path.name for path in cache.iterdir()] == ["x.pth"]
    assert (cache / "x.pth").read_bytes() == (server.folder / "x.pth").read_bytes()
    assert int((cache / "x.pth").stat().st_mtime) == int((server.folder / "x.pth").stat().st_mtime)
    api.convert(server.folder / "x.pth", tmp_path / "expected")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_text())
    assert manifest["source"]["backbone"]["address"] == source
    size, first = (server.folder / "x.pth").stat().st_size, server.sent
    assert first < size + (1 << 20)
    api.convert(source, tmp_path / "again")
    assert server.sent - first < 2 << 20
    assert torch.hub.load_state_dict_from_url(source, model_dir=str(cache)).keys() == make_states(MODEL)[0].keys()


def test_model_name_downloads_from_the_authors_address_into_the_cache(
    server: FileServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.hub does the same in the original script. A small model takes the place of the published one."""
    model = next(model for model in dinov2.FAMILY.models if model.name == "dinov2_vits14_1layer")
    dimensions = dataclasses.replace(tiny(), classes=10)
    files = [RemoteFile(file.filename, f"{server.url}/deep/{file.filename}") for file in (model.backbone, model.head)]
    small = dataclasses.replace(model, dimensions=dimensions, backbone=files[0], head=files[1])
    monkeypatch.setattr("streamconv.source.resolve.find_model", lambda name: (dinov2.FAMILY, small))
    family = dataclasses.replace(dinov2.FAMILY, models=(small,))
    monkeypatch.setattr("streamconv.families.detection.all_families", lambda: (family,))
    for file, state in zip(files, make_states(dimensions), strict=True):
        torch.save(state, server.folder / file.filename)
    streamed = api.convert(small.name, tmp_path / "streamed", stream=True)
    assert not cache.exists()
    done = api.convert(small.name, tmp_path / "out")
    assert done.shards == streamed.shards
    assert {path.name for path in cache.iterdir()} == {file.filename for file in files}
    server.requests.clear()
    api.convert(small.name, tmp_path / "again", stream=True)
    assert not server.requests


def test_interrupted_download_is_resumed(server: FileServer, source: str, cache: Path, tmp_path: Path) -> None:
    size = (server.folder / "x.pth").stat().st_size

    def break_at_half(what: str, done: int, total: int, unit: str) -> None:
        if what == "downloading x.pth" and done > total // 2:
            server.faults.cut_after, server.faults.cuts = 0, 1_000

    with pytest.raises(NetworkError):
        api.convert(source, tmp_path / "out", progress=break_at_half)
    assert not (cache / "x.pth").exists()
    assert not (tmp_path / "out").exists()
    server.faults.cuts, server.sent = 0, 0
    api.convert(source, tmp_path / "out")
    assert server.sent < size // 2 + (8 << 20)
    assert (cache / "x.pth").read_bytes() == (server.folder / "x.pth").read_bytes()
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("synced", [True, False])
def test_bytes_lost_in_a_power_cut_are_downloaded_again(
    server: FileServer, source: str, cache: Path, tmp_path: Path, synced: bool
) -> None:
    """A file system may leave zeros at the end of data that was not synced; a bad disk, in data that was."""

    def stop(what: str, done: int, total: int, unit: str) -> None:
        if what == "downloading x.pth" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.convert(source, tmp_path / "out", progress=stop)
    kept = Journal.read(cache / ".x.pth.streamconv-journal").resume_points["x.pth"].size
    with open(cache / ".x.pth.streamconv-incomplete", "r+b") as file:
        file.seek(kept - (3 << 20) if synced else kept)
        file.write(bytes(3 << 20))
    server.sent = 0
    api.convert(source, tmp_path / "out")
    size = (server.folder / "x.pth").stat().st_size
    assert (server.sent > size) == synced
    assert list(cache.iterdir()) == [cache / "x.pth"]
    assert (cache / "x.pth").read_bytes() == (server.folder / "x.pth").read_bytes()


def test_damaged_download_is_not_kept_and_starts_over(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    path = server.folder / "x.pth"
    good, state = path.read_bytes(), path.stat()
    path.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CorruptError, match=r"http://.*/x\.pth was damaged on the way: bytes .* Run the same"):
        api.convert(source, tmp_path / "out")
    assert not (cache / "x.pth").exists()
    path.write_bytes(good)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    api.convert(source, tmp_path / "out")
    assert (cache / "x.pth").read_bytes() == good


def test_partial_download_of_another_version_is_discarded(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int, unit: str) -> None:
        if what == "downloading x.pth" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.convert(source, tmp_path / "out", progress=stop)
    torch.save(make_states(MODEL, seed=1)[0], server.folder / "x.pth")
    os.utime(server.folder / "x.pth", (5, 5))
    api.convert(source, tmp_path / "out")
    assert (cache / "x.pth").read_bytes() == (server.folder / "x.pth").read_bytes()
    assert len(list(cache.iterdir())) == 1


def test_cached_file_of_unknown_origin_is_neither_used_nor_replaced(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    cache.mkdir(parents=True)
    torch.save(make_states(MODEL, seed=1)[0], cache / "x.pth")
    before = (cache / "x.pth").read_bytes()
    with pytest.raises(OutputError, match="exists already and may not be a copy of http"):
        api.convert(source, tmp_path / "out")
    assert (cache / "x.pth").read_bytes() == before
    api.convert(source, tmp_path / "out", stream=True)


def test_cached_file_without_checksums_is_identified_by_its_modification_time(
    server: FileServer, cache: Path, tmp_path: Path
) -> None:
    path = server.folder / "x.safetensors"
    safetensors.torch.save_file(make_states(MODEL)[0], path)
    os.utime(path, (1_000_000, 1_000_000))
    source = f"{server.url}/x.safetensors"
    api.convert(source, tmp_path / "out")
    assert api.convert(source, tmp_path / "out").was_finished
    safetensors.torch.save_file(make_states(MODEL, seed=1)[0], path)
    os.utime(path, (2_000_000, 2_000_000))
    with pytest.raises(OutputError, match="exists already and may not be a copy of http"):
        api.convert(source, tmp_path / "out")


def test_server_without_ranges_is_downloaded_whole(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    server.faults.ranges = False
    api.convert(source, tmp_path / "out")
    assert (cache / "x.pth").read_bytes() == (server.folder / "x.pth").read_bytes()
    shutil.rmtree(cache)
    (server.folder / "x.pth").write_text("<html>" + "no model here " * 100_000)
    with pytest.raises(SourceError, match=r"http://.*/x\.pth is neither.*looks like a web page") as caught:
        api.convert(source, tmp_path / "other")
    assert "streamconv-incomplete" not in str(caught.value)
    assert not (cache / "x.pth").exists()


def test_download_from_a_server_without_ranges_is_used_again(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    server.faults.ranges = False
    api.convert(source, tmp_path / "out")
    assert api.convert(source, tmp_path / "out").was_finished
    assert not api.convert(source, tmp_path / "other").was_finished
    os.utime(server.folder / "x.pth", (2_000_000, 2_000_000))
    with pytest.raises(OutputError, match="exists already and may not be a copy of http"):
        api.convert(source, tmp_path / "out")


def test_unknown_model_is_refused_before_it_is_downloaded(server: FileServer, cache: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.randn(5_000_000)}, server.folder / "x.pth")
    with pytest.raises(SourceError, match="not a checkpoint of a model"):
        api.convert(f"{server.url}/x.pth", tmp_path / "out")
    assert server.sent < 2 << 20
    assert not cache.exists()


def test_finished_folder_needs_no_download(server: FileServer, source: str, cache: Path, tmp_path: Path) -> None:
    api.convert(source, tmp_path / "out")
    shutil.rmtree(cache)
    assert api.convert(source, tmp_path / "out").was_finished
    assert not cache.exists()


def test_folder_of_another_unfinished_conversion_is_refused_before_a_download(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    interrupt_after(server.folder / "x.pth", tmp_path / "out", 0.5)
    with pytest.raises(OutputError, match="holds an unfinished conversion"):
        api.convert(source, tmp_path / "out", dtype="float16")
    assert not cache.exists()


def test_disk_that_holds_the_download_or_the_output_but_not_both_is_refused_before_the_download(
    server: FileServer, source: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (server.folder / "x.pth").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size * 3 // 2))
    message = r"(?s)checkpoints and .*out together need .* bytes.*--stream"
    with pytest.raises(OutputError, match=message):
        api.convert(source, tmp_path / "out")
    with pytest.raises(OutputError, match=message):
        preview(source, tmp_path / "out", ConversionOptions(), None, None)
    assert not cache.exists()
    api.convert(source, tmp_path / "out", stream=True)


def test_output_that_cannot_be_written_is_refused_before_the_download(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Not a directory"):
        api.convert(source, tmp_path / "file" / "out")
    assert not cache.exists()


def test_damaged_cached_file_is_reported_with_the_advice_to_delete_it(
    server: FileServer, source: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.convert(source, tmp_path / "out")
    data = bytearray((cache / "x.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (cache / "x.pth").write_bytes(data)
    with pytest.raises(CorruptError, match=r"torch\.hub's copy\. Delete it to fetch it again:\n  .*checkpoints/x\.pth"):
        api.convert(source, tmp_path / "again")
    (cache / "x.pth").write_bytes(data[:1000])
    with pytest.raises(SourceError, match=r"Delete it"):
        api.convert(cache / "x.pth", tmp_path / "again")


def test_second_download_of_the_same_file_is_refused(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    server.faults.seconds_a_megabyte = 0.05
    command = [sys.executable, "-m", "streamconv", "convert", source, "-o"]
    first = subprocess.Popen([*command, str(tmp_path / "one")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not list(cache.glob(".x.pth.*")):
        time.sleep(0.01)
    with pytest.raises(OutputError, match=rf"x\.pth is being written by process {first.pid} on"):
        api.convert(source, tmp_path / "two")
    server.faults.seconds_a_megabyte = 0
    assert first.wait() == 0
    api.convert(source, tmp_path / "two")
