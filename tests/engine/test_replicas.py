"""Several servers behind one address, which name the version of one file differently, as those of some CDNs do."""

import dataclasses
from collections.abc import Iterator
from itertools import chain, count, cycle, repeat
from pathlib import Path

import pytest
import safetensors.torch
import torch

from streamconv import ChangedError, CorruptError
from streamconv.files import remote
from streamconv.files.address import Address
from streamconv.files.open import open_file
from streamconv.files.reader import Reader
from streamconv.files.versions import MAX_OTHERS_IN_A_ROW
from streamconv.formats.checkpoint import open_checkpoint
from streamconv.output.manifest import Manifest
from streamconv.tensors.evaluation import read_bytes
from tests import api
from tests.checkpoints import make_states
from tests.file_server import FileServer
from tests.support import flip, tiny

MODEL = tiny(layers=3, hidden=256)  # 10 MB
A, B = {"ETag": '"a"'}, {"ETag": '"b-2"'}
TIMES = [{"Last-Modified": f"Mon, 01 Jan 2024 00:00:0{i} GMT"} for i in range(2)]


@pytest.fixture
def server(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    """Run a file server that sends no header for a version, and is asked for many small parts."""
    monkeypatch.setattr(remote.RemoteFile, "request_bytes", 256 << 10)
    server.faults.etag = server.faults.last_modified = False
    return server


@pytest.fixture
def pth(server: FileServer) -> Path:
    torch.save(make_states(MODEL)[0], server.folder / "x.pth")
    return server.folder / "x.pth"


@pytest.fixture
def tensors(server: FileServer) -> Path:
    """Return the path of a file without CRC-32s."""
    safetensors.torch.save_file(make_states(MODEL)[0], server.folder / "x.safetensors")
    return server.folder / "x.safetensors"


def different_each_time() -> Iterator[dict[str, str]]:
    return ({"ETag": f'"{i}"'} for i in count())


VARYING = {
    "two ETags in turn": lambda: cycle([A, B]),
    "two times in turn": lambda: cycle(TIMES),
    "an ETag or none": lambda: cycle([A, {}]),
    "seldom the first ETag": lambda: cycle([A, *[B] * 7]),
    "another ETag from then on": lambda: chain([A, A], repeat(B)),
    "another ETag each time": different_each_time,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("varying", VARYING)
def test_file_with_checksums_is_converted(
    server: FileServer, pth: Path, tmp_path: Path, varying: str, stream: bool
) -> None:
    server.faults.varying = VARYING[varying]()
    done = api.convert(f"{server.url}/x.pth", tmp_path / "out", stream=stream)
    assert done.shards == api.convert(pth, tmp_path / "expected").shards
    assert done.is_crc_checked
    server.sent = 0
    assert api.convert(f"{server.url}/x.pth", tmp_path / "out", stream=stream).was_finished
    # Of another version, up to 20 responses of 256 kB each are refused, and may have been sent completely.
    assert server.sent < pth.stat().st_size * 3 / 4


@pytest.mark.parametrize("varying", ["two ETags in turn", "two times in turn", "seldom the first ETag"])
@pytest.mark.parametrize("stream", [False, True])
def test_file_without_checksums_is_converted_if_the_first_version_comes_back(
    server: FileServer, tensors: Path, tmp_path: Path, varying: str, stream: bool
) -> None:
    server.faults.varying = VARYING[varying]()
    done = api.convert(f"{server.url}/x.safetensors", tmp_path / "out", stream=stream)
    assert done.shards == api.convert(tensors, tmp_path / "expected").shards


@pytest.mark.parametrize("stream", [False, True])
def test_file_without_checksums_is_refused_with_the_reason(
    server: FileServer, tensors: Path, tmp_path: Path, stream: bool
) -> None:
    source = f"{server.url}/x.safetensors"
    server.faults.varying = different_each_time()
    message = r'its servers disagree about its version \(ETag "0", ETag "\d+"\).*curl -L -o'
    with pytest.raises(ChangedError, match=message):
        api.convert(source, tmp_path / "out", stream=stream)
    server.faults.varying = chain([A, A], repeat(B))
    with pytest.raises(ChangedError, match="was changed while it was read"):
        api.convert(source, tmp_path / "out", stream=stream)
    assert not list(tmp_path.rglob("*.safetensors")) or list(tmp_path.rglob("*.safetensors")) == [tensors]


def test_servers_whose_files_differ_are_found_by_the_checksums(server: FileServer, pth: Path, tmp_path: Path) -> None:
    """A bit is flipped after the index was read; the server continues with another ETag."""
    flip(pth, "blocks.1.attn.qkv.weight", 1000)
    server.faults.varying = chain([A, A], repeat(B))
    for stream in (True, False):
        with pytest.raises(CorruptError, match=r"changed while|damaged on the way"):
            api.convert(f"{server.url}/x.pth", tmp_path / "out", stream=stream)


def test_parts_of_records_of_another_version_are_not_proved_by_checksums(
    server: FileServer, pth: Path, tmp_path: Path
) -> None:
    """A shard that holds a part of a record compares the record afterwards, by reading it again."""
    options = {"max_shard_size": "500KB", "stream": True}
    for varying in (chain([A] * 4, repeat(B)), chain([A] * 4, [B] * (MAX_OTHERS_IN_A_ROW + 10), repeat(A))):
        server.faults.varying = varying
        with pytest.raises(ChangedError, match=r"was changed while it was read|its servers disagree"):
            api.convert(f"{server.url}/x.pth", tmp_path / "out", **options)
    options["stream"] = False
    server.faults.varying = chain([A] * 4, repeat(B))
    done = api.convert(f"{server.url}/x.pth", tmp_path / "whole", **options)
    assert done.shards == api.convert(pth, tmp_path / "expected", max_shard_size="500KB").shards


def test_process_that_opens_the_file_again_finds_the_same_version(server: FileServer, tensors: Path) -> None:
    server.faults.varying = cycle([A, B, B])
    source = Address(f"{server.url}/x.safetensors")
    first = open_file(source)
    first.close()
    for _ in range(5):
        with Reader() as reader:
            assert reader.open(first.ref).ref == first.ref
    other = dataclasses.replace(first.ref, version=(("etag", '"c"'),))
    with Reader() as reader, pytest.raises(ChangedError, match="was changed after its index was read"):
        reader.open(other)


def test_bytes_that_are_not_compared_with_checksums_are_of_one_version(server: FileServer, pth: Path) -> None:
    with open_checkpoint(f"{server.url}/x.pth") as checkpoint:
        server.faults.varying = repeat(B)
        with pytest.raises(ChangedError):
            read_bytes(checkpoint["blocks.1.attn.qkv.weight"], checkpoint.reader)


def test_manifest_of_a_streamed_file_with_checksums_names_no_version(
    server: FileServer, pth: Path, tmp_path: Path
) -> None:
    server.faults.varying = cycle([A, B])
    api.convert(f"{server.url}/x.pth", tmp_path / "out", stream=True)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.source["backbone"].version == {}


def test_copy_is_known_by_every_version_that_it_was_downloaded_as(
    server: FileServer, tensors: Path, tmp_path: Path
) -> None:
    """The servers change their ETag from one run to the next: the bytes are downloaded again once for each."""
    source = f"{server.url}/x.safetensors"
    for each, is_downloaded in ((A, True), (B, True), (A, False), (B, False)):
        server.faults.varying, server.sent = repeat(each), 0
        api.convert(source, tmp_path / "out")
        assert (server.sent > tensors.stat().st_size) == is_downloaded


def test_copy_of_a_file_in_the_hubs_store_is_known_by_the_hubs_own_hash(
    server: FileServer, tensors: Path, tmp_path: Path
) -> None:
    """The Hub redirects to a server whose ETag may differ from one run to the next."""
    server.faults.redirects = {"/o/n/resolve/main/x.safetensors": "/cdn/x.safetensors?signature=secret"}
    for linked, each, is_downloaded in (("h", A, True), ("h", B, False), ("i", B, True), ("i", A, False)):
        server.faults.varying, server.sent = repeat(each), 0
        server.faults.refusal = b"", {"X-Linked-ETag": f'"{linked}"'}
        api.convert(f"{server.url}/o/n/resolve/main/x.safetensors", tmp_path / "out")
        assert (server.sent > tensors.stat().st_size) == is_downloaded
