"""Downloads into torch.hub's cache: complete or absent, resumed, and never mistaken for another file."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

import streamconv
from streamconv import (
    Conversion,
    ConversionOptions,
    CorruptError,
    NetworkError,
    OutputError,
    SourceError,
    Verification,
    VerificationOptions,
)
from streamconv.families import dinov2
from streamconv.families.base import RemoteFile
from streamconv.files import remote
from streamconv.files.address import Address
from streamconv.jobs.preview import preview
from streamconv.output.journal import Journal
from streamconv.output.manifest import Manifest, SourceFile
from streamconv.source.cache import Download, own_path
from streamconv.source.outputs import without_foreign_claims
from tests import api
from tests.checkpoints import make_states, saved
from tests.file_server import FileServer
from tests.support import interrupt_after, sha256_of, tiny

MODEL = tiny(layers=3, hidden=512)  # 38 MB


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamconv.output.writer.SYNC_BYTES", 2 << 20)
    monkeypatch.setattr(remote.RemoteFile, "request_bytes", 1 << 20)


RECORD = ".x.pth.streamconv-download.json"


@pytest.fixture
def torch_hub(server: FileServer, tmp_path: Path) -> Path:
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def cache(server: FileServer, torch_hub: Path) -> Path:
    """Return the folder of the copy of `source`."""
    folder = own_path(Address(f"{server.url}/x.pth")).parent
    assert folder.parent == torch_hub / "streamconv"
    return folder


@pytest.fixture
def source(server: FileServer, cache: Path) -> str:
    torch.save(make_states(MODEL)[0], server.folder / "x.pth")
    return f"{server.url}/x.pth"


def test_address_is_downloaded_once_and_converted_from_the_cache(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    api.convert(source, tmp_path / "out")
    assert {path.name for path in cache.iterdir()} == {"x.pth", RECORD}
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
    server: FileServer, torch_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.hub does the same in the original script. A small model takes the place of the published one."""
    model = next(model for model in dinov2.FAMILY.models if model.name == "dinov2_vits14_1layer")
    dimensions = dataclasses.replace(tiny(), classes=10)
    files = [RemoteFile(file.filename, f"{server.url}/deep/{file.filename}") for file in (model.backbone, model.head)]
    small = dataclasses.replace(model, dimensions=dimensions, backbone=files[0], head=files[1])
    monkeypatch.setattr("streamconv.source.resolve.find_model", lambda name: (dinov2.FAMILY, small))
    family = dataclasses.replace(dinov2.FAMILY, models=(small,))
    monkeypatch.setattr("streamconv.families.detection.all_families", lambda: (family,))
    for module in ("cache", "authors"):
        monkeypatch.setattr(f"streamconv.source.{module}.published_files", lambda: frozenset(files))
    for file, state in zip(files, make_states(dimensions), strict=True):
        torch.save(state, server.folder / file.filename)
    streamed = api.convert(small.name, tmp_path / "streamed", stream=True)
    assert not list(torch_hub.rglob("*.pth"))
    done = api.convert(small.name, tmp_path / "out")
    assert done.shards == streamed.shards
    kept = {*(file.filename for file in files), "streamconv"}
    assert {path.name for path in torch_hub.iterdir()} == kept
    server.requests.clear()
    api.convert(small.name, tmp_path / "again", stream=True)
    assert not server.requests
    first = server.sent
    api.convert(files[0].url, tmp_path / "by_address")
    assert server.sent < first + (1 << 20)
    assert {path.name for path in torch_hub.iterdir()} == kept
    for folder in ("streamed", "out", "again", "by_address"):
        source = json.loads((tmp_path / folder / "streamconv.json").read_text())["source"]
        for role, file in zip(source, files, strict=False):
            assert (source[role]["published"], source[role]["address"]) == (True, file.url), folder
            assert source[role]["sha256"] in ("", sha256_of(torch_hub / file.filename))


@pytest.fixture
def published(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> RemoteFile:
    """Return a file that takes the place of a published one. At first, the server has it."""
    file = RemoteFile("dinov2_vits14_pretrain.pth", f"{server.url}/dinov2_vits14_pretrain.pth")
    for module in ("cache", "authors"):
        monkeypatch.setattr(f"streamconv.source.{module}.published_files", lambda: frozenset({file}))
    torch.save(make_states(tiny())[0], server.folder / file.filename)
    return file


def source_of(done: streamconv.Conversion) -> SourceFile:
    manifest = Manifest.read(done.output)
    assert manifest is not None
    return manifest.source["backbone"]


@pytest.mark.parametrize("is_same", [True, False])
def test_file_found_in_torch_hubs_cache_is_used_but_not_called_published(
    server: FileServer, published: RemoteFile, torch_hub: Path, tmp_path: Path, is_same: bool
) -> None:
    """The file at the published URL is downloaded if that is given, although a file there has the same CRC-32s."""
    torch_hub.mkdir(parents=True)
    path = torch_hub / published.filename
    torch.save(make_states(tiny(), seed=0 if is_same else 1)[0], path)
    note = "was found in torch.hub's cache and was not downloaded by streamconv"
    planned = api.plan(path)
    assert any(note in each and published.url in each for each in planned.notes)
    done = api.convert(path, tmp_path / "found")
    assert done.plan.notes == planned.notes
    assert (source_of(done).published, source_of(done).found_in_cache) == (False, True)
    assert not server.requests
    before = path.read_bytes()
    done = api.convert(published.url, tmp_path / "published")
    assert (source_of(done).published, source_of(done).address) == (True, published.url)
    assert done.plan.notes == api.plan(server.folder / published.filename).notes
    assert path.read_bytes() == before
    own = own_path(Address(published.url))
    assert own.read_bytes() == (server.folder / published.filename).read_bytes()
    server.sent = 0
    assert source_of(api.convert(published.url, tmp_path / "again")).published  # from the copy
    server.faults.statuses = [503] * 100
    assert source_of(api.convert(published.url, tmp_path / "offline")).published


def test_copy_in_torch_hubs_cache_is_used_offline(server: FileServer, published: RemoteFile, tmp_path: Path) -> None:
    done = api.convert(published.url, tmp_path / "out")
    server.faults.statuses = [503] * 100
    again = api.convert(published.url, tmp_path / "again")
    assert again.shards == done.shards
    assert any("its server could not be asked whether it has changed" in note for note in again.plan.notes)
    assert source_of(again).published


def test_file_of_a_published_name_from_elsewhere_is_not_torch_hubs(
    server: FileServer, published: RemoteFile, torch_hub: Path, tmp_path: Path
) -> None:
    for number, url in enumerate((f"{server.url}/mirror/{published.filename}", f"{published.url}?x=1")):
        done = api.convert(url, tmp_path / f"other{number}")
        assert not source_of(done).published
        assert not (torch_hub / published.filename).exists()
    done = api.convert(published.url, tmp_path / "published")
    assert source_of(done).published
    assert (torch_hub / published.filename).exists()


def test_torch_hub_may_replace_a_download(
    server: FileServer, published: RemoteFile, torch_hub: Path, tmp_path: Path
) -> None:
    """It writes the same bytes as another file. Other bytes of the same size are not taken for them."""
    api.convert(published.url, tmp_path / "out")
    path = torch_hub / published.filename
    path.unlink()
    torch.hub.download_url_to_file(published.url, str(path), progress=False)
    done = api.convert(path, tmp_path / "again")
    assert (source_of(done).published, source_of(done).sha256) == (True, sha256_of(path))
    data = bytearray(path.read_bytes())
    torch.save(make_states(tiny(), seed=1)[0], path)
    assert path.stat().st_size == len(data)
    done = api.convert(path, tmp_path / "other")
    assert (source_of(done).published, source_of(done).found_in_cache) == (False, True)


def test_manifest_of_a_folder_from_elsewhere_proves_nothing(
    server: FileServer, published: RemoteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = api.convert(published.url, tmp_path / "theirs")
    assert source_of(done).published
    manifest = Manifest.read(done.output)
    assert manifest is not None
    assert without_foreign_claims(manifest) == manifest  # it was made here
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "of another user"))
    assert not without_foreign_claims(manifest).source["backbone"].published
    again = api.convert(done.output, tmp_path / "mine")
    assert not source_of(again).published
    assert again.plan.names["model"] is None


@pytest.mark.parametrize("queries", [("", ""), ("?X-Amz-Signature=1", "?X-Amz-Signature=2")])
def test_interrupted_download_is_resumed(
    server: FileServer, source: str, cache: Path, tmp_path: Path, queries: tuple[str, str]
) -> None:
    """Also by a new link, if the first one was signed and has expired."""
    size = (server.folder / "x.pth").stat().st_size

    def break_at_half(what: str, done: int, total: int, unit: str) -> None:
        if what == "downloading x.pth" and done > total // 2:
            server.faults.cut_after, server.faults.cuts = 0, 1_000

    with pytest.raises(NetworkError):
        api.convert(source + queries[0], tmp_path / "out", progress=break_at_half)
    assert not (cache / "x.pth").exists()
    assert not (tmp_path / "out").exists()
    server.faults.cuts, server.sent = 0, 0
    api.convert(source + queries[1], tmp_path / "out")
    assert server.sent < size // 2 + (8 << 20)
    assert (cache / "x.pth").read_bytes() == (server.folder / "x.pth").read_bytes()
    assert {path.name for path in cache.iterdir()} == {"x.pth", RECORD}


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
    assert {path.name for path in cache.iterdir()} == {"x.pth", RECORD}
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


def test_download_that_contradicts_the_hash_in_its_published_name_is_not_kept(
    server: FileServer, torch_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authors' addresses may be signed, so the name of the file decides, not the address."""
    state = saved(make_states(tiny())[0], tmp_path / "x.pth").read_bytes()
    digest = sha256(state).hexdigest()
    for digits, is_kept in ((digest[:8], True), (f"{int(digest[:8], 16) ^ 1:08x}", False)):
        name = f"model-{digits}.pth"
        known = frozenset({RemoteFile(name, f"https://example.org/{name}")})
        monkeypatch.setattr("streamconv.source.authors.published_files", lambda known=known: known)
        (server.folder / name).write_bytes(state)
        if is_kept:
            assert api.convert(f"{server.url}/{name}", tmp_path / "out").plan.dimensions == tiny()
            continue
        with pytest.raises(CorruptError, match=f"its sha256 begins with {digest[:8]}, and not with {digits}"):
            api.convert(f"{server.url}/{name}", tmp_path / "other")
        assert not [*torch_hub.rglob(name)]
        done = api.convert(server.folder / name, tmp_path / "local")
        assert any(f"the sha256 of {name} begins with {digest[:8]}, not with" in note for note in done.plan.notes)


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
    assert {path.name for path in cache.iterdir()} == {"x.pth", RECORD}


def test_file_in_torch_hubs_cache_is_used_only_if_it_is_the_same(
    server: FileServer, source: str, torch_hub: Path, cache: Path, tmp_path: Path
) -> None:
    """Such as a copy by torch.hub, or by streamconv 0.2.0. CRC-32s identify it, whatever its time is."""
    torch_hub.mkdir(parents=True)
    torch.save(make_states(MODEL, seed=1)[0], torch_hub / "x.pth")
    before = (torch_hub / "x.pth").read_bytes()
    api.convert(source, tmp_path / "out")
    assert (torch_hub / "x.pth").read_bytes() == before
    shutil.rmtree(cache)
    shutil.copy(server.folder / "x.pth", torch_hub)
    server.sent = 0
    api.convert(source, tmp_path / "again")
    assert server.sent < 2 << 20
    assert not cache.exists()


def test_file_without_checksums_in_torch_hubs_cache_is_identified_by_its_time(
    server: FileServer, torch_hub: Path, tmp_path: Path
) -> None:
    """curl -R and streamconv 0.2.0 keep the server's time. Another file of this name is neither used nor replaced."""
    safetensors.torch.save_file(make_states(MODEL)[0], server.folder / "x.safetensors")
    torch_hub.mkdir(parents=True)
    shutil.copy2(server.folder / "x.safetensors", torch_hub)
    os.utime(torch_hub / "x.safetensors", (int((server.folder / "x.safetensors").stat().st_mtime),) * 2)
    source = f"{server.url}/x.safetensors"
    api.convert(source, tmp_path / "out")
    assert server.sent < 2 << 20
    os.utime(torch_hub / "x.safetensors", (5, 5))
    api.convert(source, tmp_path / "other")
    assert server.sent > 30 << 20
    assert (torch_hub / "x.safetensors").stat().st_mtime == 5


@pytest.mark.parametrize("given", ["etag", "last_modified"])
@pytest.mark.parametrize("ranges", [True, False])
def test_download_without_checksums_is_used_until_the_server_has_another_version(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str, ranges: bool
) -> None:
    path, source = server.folder / "x.safetensors", f"{server.url}/x.safetensors"
    server.faults.etag, server.faults.last_modified = given == "etag", given == "last_modified"
    server.faults.ranges = ranges
    safetensors.torch.save_file(make_states(MODEL)[0], path)
    os.utime(path, (1_000_000, 1_000_000))
    api.convert(source, tmp_path / "out")
    server.sent = 0
    assert api.convert(source, tmp_path / "out").was_finished
    assert not api.convert(source, tmp_path / "second").was_finished
    assert server.sent < 16 << 20  # without ranges, the sockets' buffers are filled
    assert not caplog.messages
    safetensors.torch.save_file(make_states(MODEL, seed=1)[0], path)
    os.utime(path, (2_000_000, 2_000_000))
    api.convert(source, tmp_path / "new")
    api.convert(path, tmp_path / "expected")
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (
        tmp_path / "expected" / "model.safetensors"
    ).read_bytes()
    assert caplog.messages == [
        f"{source} was downloaded before, but it has changed on its server: downloading it again"
    ]
    with pytest.raises(OutputError, match="its backbone differs"):
        api.convert(source, tmp_path / "out")


def test_download_that_nothing_identifies_is_repeated_and_the_same_bytes_are_recognised(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, source = server.folder / "x.safetensors", f"{server.url}/x.safetensors"
    server.faults.etag = server.faults.last_modified = False
    safetensors.torch.save_file(make_states(MODEL)[0], path)
    api.convert(source, tmp_path / "out")
    server.sent = 0
    assert api.convert(source, tmp_path / "out").was_finished
    assert server.sent > path.stat().st_size
    assert "sends neither an ETag nor a Last-Modified" in caplog.text
    safetensors.torch.save_file(make_states(MODEL, seed=1)[0], path)
    with pytest.raises(OutputError, match="its backbone differs"):
        api.convert(source, tmp_path / "out")


def test_job_downloads_a_file_once_although_nothing_identifies_it(
    server: FileServer, published: RemoteFile, torch_hub: Path, tmp_path: Path
) -> None:
    """And verification alone shows whose weights they are, if the folder was not converted on this machine."""
    safetensors.torch.save_file(make_states(MODEL)[0], server.folder / published.filename)
    server.faults.etag = server.faults.last_modified = False
    options = ConversionOptions(), VerificationOptions(device="cpu", parity=False)
    outputs = torch_hub / "streamconv" / "outputs"

    def forget(result: Conversion | Verification) -> None:
        if isinstance(result, Conversion):
            shutil.rmtree(outputs)

    assert streamconv.run(published.url, tmp_path / "out", *options, on_result=forget).passed
    size = (server.folder / published.filename).stat().st_size
    assert size < server.sent < size + (2 << 20)
    assert len(list(outputs.iterdir())) == 2  # the verdict, and whose weights these are


def test_files_of_one_name_at_two_urls_are_kept_apart(server: FileServer, torch_hub: Path, tmp_path: Path) -> None:
    """The server finds a file by the end of its path: seed 0 is at /one/…, then seed 1 at /two/…, of one time."""
    path, states = server.folder / "x.safetensors", [make_states(MODEL, seed=seed)[0] for seed in (0, 1)]
    for folder, state in zip(("one", "two", "one", "two"), states * 2, strict=True):
        safetensors.torch.save_file(state, path)
        os.utime(path, (1_000_000, 1_000_000))
        server.sent = 0
        done = api.convert(f"{server.url}/{folder}/x.safetensors", tmp_path / folder)
        assert done.was_finished == (server.sent < 2 << 20)
        expected = api.convert(path, tmp_path / f"{folder}_local")
        assert done.shards == expected.shards
    assert sorted(each.name for each in (torch_hub / "streamconv").glob("*/[!.]*")) == ["x.safetensors"] * 2


@pytest.mark.parametrize(("one", "other", "is_same"), [
    ("x.pth?X-Amz-Signature=SECRET1&X-Amz-Date=1", "x.pth?X-Amz-Signature=SECRET2", True),
    ("x.pth?Policy=SECRET1&Signature=SECRET1&Key-Pair-Id=1&Download-Request-ID=1", "x.pth", True),
    ("x.pth?sv=2024&sig=SECRET1%3D", "x.pth?download=true", True),
    ("x.pth?file=1", "x.pth?file=2", False),
])  # fmt: skip
def test_signed_query_may_change_but_any_other_query_names_the_file(
    server: FileServer, source: str, torch_hub: Path, tmp_path: Path, one: str, other: str, is_same: bool
) -> None:
    api.convert(f"{server.url}/{one}", tmp_path / "out")
    api.convert(f"{server.url}/{other}", tmp_path / "out")
    api.convert(f"{server.url}/{other}", tmp_path / "again")
    copies = [each for each in (torch_hub / "streamconv").rglob("*") if each.is_file()]
    assert len(copies) == (2 if is_same else 4)
    for each in copies:
        assert b"SECRET" not in bytes(each) + each.read_bytes()


def test_copy_is_used_with_a_note_while_its_server_cannot_be_reached(
    server: FileServer, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = api.convert(source, tmp_path / "out")
    server.faults.statuses = [503] * 100
    again = api.convert(source, tmp_path / "again")
    assert again.shards == done.shards
    assert any("its server could not be asked whether it has changed" in note for note in again.plan.notes)
    assert not any("its server" in note for note in done.plan.notes)
    assert "Using the copy that was downloaded before" in caplog.text
    with pytest.raises(NetworkError):
        api.convert(f"{source}x", tmp_path / "other")


def test_copy_of_a_file_on_the_hub_is_used_if_requests_are_forbidden(
    server: FileServer, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = own_path(Address("hf://o/n/x.pth"))
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
        api.convert("hf://o/n/x.pth", tmp_path / "out")
    path.parent.mkdir(parents=True)
    shutil.copy(server.folder / "x.pth", path)
    record = Download("hf://o/n/x.pth", path.stat().st_size, "", (), True, "2026-01-31")
    record.write(path)
    done = api.convert("hf://o/n/x.pth", tmp_path / "out")
    assert done.shards == api.convert(server.folder / "x.pth", tmp_path / "expected").shards
    assert any("hf://o/n/x.pth of 2026-01-31" in note for note in done.plan.notes)


def test_copy_of_a_converted_model_is_used_with_its_configuration(server: FileServer, tmp_path: Path) -> None:
    """It was kept beside the copy, since it says what the tensors do not show."""
    api.convert(tiny_file(server), tmp_path / "model")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        shutil.copy(tmp_path / "model" / name, server.folder)
    api.convert(f"{server.url}/model.safetensors", tmp_path / "out")
    server.faults.statuses = [503] * 100
    again = api.convert(f"{server.url}/model.safetensors", tmp_path / "again")
    assert "config.json: kept from the source" in again.plan.notes
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def tiny_file(server: FileServer) -> Path:
    torch.save(make_states(tiny())[0], server.folder / "tiny.pth")
    return server.folder / "tiny.pth"


@pytest.mark.parametrize("damage", ["record", "file", "both"])
def test_damaged_copy_or_record_is_downloaded_again(
    server: FileServer, source: str, cache: Path, tmp_path: Path, damage: str
) -> None:
    expected = api.convert(source, tmp_path / "out").shards
    if damage in ("record", "both"):
        (cache / RECORD).write_text('{"format_version": 1, "size": "many"}')
    if damage in ("file", "both"):
        (cache / "x.pth").write_bytes((cache / "x.pth").read_bytes()[:1000])
    assert api.convert(source, tmp_path / "again").shards == expected
    assert (cache / "x.pth").read_bytes() == (server.folder / "x.pth").read_bytes()


def test_server_without_ranges_is_downloaded_whole(
    server: FileServer, source: str, cache: Path, tmp_path: Path
) -> None:
    server.faults.ranges = False
    api.convert(source, tmp_path / "out")
    assert (cache / "x.pth").read_bytes() == (server.folder / "x.pth").read_bytes()
    shutil.rmtree(cache)
    (server.folder / "x.pth").write_text("<html>" + "no model here " * 100_000)
    with pytest.raises(SourceError, match=r"http://.*/x\.pth is a web page") as caught:
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
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=9, f_bavail=size * 3 // 2, f_frsize=1))
    message = r"(?s)checkpoints/streamconv/127.* and .*out together need .* bytes.*--stream"
    with pytest.raises(OutputError, match=message):
        api.convert(source, tmp_path / "out")
    with pytest.raises(OutputError, match=message):
        preview(source, tmp_path / "out", ConversionOptions(), None, None)
    assert not (cache / "x.pth").exists()
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
    with pytest.raises(CorruptError, match=r"copy in torch\.hub's cache\. Delete it to fetch it again: .*/x\.pth"):
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
