"""No order of commands turns another file's bytes into those that the authors published.

CRC-32s can be forged, so that other weights have the fingerprint of the published file. And a folder from elsewhere can
have any manifest.
"""

import dataclasses
import zlib
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import streamconv
from streamconv.hub.names import published_model
from streamconv.output.journal import JOURNAL_NAME
from streamconv.output.manifest import MANIFEST_NAME, Manifest
from streamconv.source.cache import Download, torch_hub_cache
from streamconv.source.outputs import remember_output, without_foreign_claims
from tests import api
from tests.checkpoints import make_states
from tests.hub_server import HubServer
from tests.support import PUBLISHED, contents, interrupt_after, tiny, to_hub

SHARDS = {"max_shard_size": "500kB"}


def with_crc32(data: bytes, wanted: int) -> bytes:
    """Return ``data`` with its last four bytes replaced, so that its CRC-32 is ``wanted``."""
    table = [0] * 256
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        table[byte] = value
    inverse = {value >> 24: byte for byte, value in enumerate(table)}
    register, indexes = wanted ^ 0xFFFFFFFF, []
    for _ in range(4):
        indexes.append(inverse[register >> 24])
        register = (register ^ table[indexes[-1]]) << 8 & 0xFFFFFFFF
    register, end = zlib.crc32(data[:-4]) ^ 0xFFFFFFFF, bytearray()
    for index in reversed(indexes):
        end.append((register ^ index) & 0xFF)
        register = register >> 8 ^ table[index]
    return data[:-4] + end


@pytest.fixture
def genuine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a small model that is recorded as downloaded from the authors' URL."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch_hub_cache().mkdir(parents=True)
    path = torch_hub_cache() / PUBLISHED["file"]
    torch.save(make_states(tiny())[0], path)
    state, digest = path.stat(), sha256(path.read_bytes()).hexdigest()
    times = {"modified_ns": state.st_mtime_ns, "changed_ns": state.st_ctime_ns}
    Download(PUBLISHED["address"], state.st_size, digest, (), True, "2026-01-31", is_published=True, **times).write(
        path
    )
    return path


@pytest.fixture
def forged(genuine: Path, tmp_path: Path) -> Path:
    """Return a file with another CLS token, and with the name, the size and the CRC-32s of the genuine one."""
    data = bytearray(genuine.read_bytes())
    with streamconv.open_checkpoint(genuine) as checkpoint:
        place, fingerprint = checkpoint["cls_token"].record.range, checkpoint.fingerprint
    before = bytes(data[place.start : place.end])
    data[place.start : place.end] = with_crc32(bytes([before[0] ^ 1]) + before[1:], zlib.crc32(before))
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / genuine.name
    path.write_bytes(data)
    with streamconv.open_checkpoint(path) as checkpoint:
        assert checkpoint.fingerprint == fingerprint
    return path


def manifest_of(folder: Path) -> Manifest:
    manifest = Manifest.read(folder)
    assert manifest is not None
    return manifest


def is_published(folder: Path) -> bool:
    return manifest_of(folder).source["backbone"].published


def is_vouched_for(folder: Path) -> bool:
    """Return whether a model card would say that the authors published the source."""
    return without_foreign_claims(manifest_of(folder)).source["backbone"].published


def lose_the_last_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def test_resumed_bytes_of_another_file_are_not_the_authors_own(
    genuine: Path, forged: Path, tmp_path: Path, frequent_journal_entries: None
) -> None:
    out = tmp_path / "out"
    interrupt_after(forged, out, 0.7)
    assert api.convert(genuine, out).resumed_bytes
    assert not is_published(out)
    assert not is_vouched_for(out)


def test_kept_bytes_of_another_file_are_not_the_authors_own(genuine: Path, forged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.convert(forged, out, **SHARDS)
    assert api.convert(genuine, out, **SHARDS).was_finished
    assert not is_published(out)
    lose_the_last_shard(out)
    assert api.convert(genuine, out, **SHARDS).resumed_bytes
    assert not is_published(out)
    assert not is_vouched_for(out)
    api.convert(genuine, out, force=True, **SHARDS)
    assert is_vouched_for(out)


def test_bytes_in_a_folder_from_elsewhere_are_not_the_authors_own(genuine: Path, forged: Path, tmp_path: Path) -> None:
    """Their manifest says that the source was published. The folder is completed from the published file."""
    theirs = api.convert(forged, tmp_path / "theirs", **SHARDS).output
    manifest = manifest_of(theirs)
    source = {role: dataclasses.replace(file, published=True) for role, file in manifest.source.items()}
    (theirs / MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, source=source).to_bytes())
    lose_the_last_shard(theirs)
    assert api.convert(genuine, theirs, **SHARDS).resumed_bytes
    assert not is_vouched_for(theirs)


def test_resumed_conversion_is_the_authors_own_once_it_is_verified(
    genuine: Path, tmp_path: Path, frequent_journal_entries: None
) -> None:
    out = tmp_path / "out"
    interrupt_after(genuine, out, 0.7)
    assert api.convert(genuine, out).resumed_bytes
    assert is_published(out)
    assert not is_vouched_for(out)
    manifest = manifest_of(out)
    remember_output(manifest.source, manifest.files)  # as a verification that passed
    assert is_vouched_for(out)


def interrupt_upload(source: Path, stage: Path) -> None:
    """Upload one shard, and write a part of the second one."""

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if what.startswith("writing") and "00002-of" in what and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_hub(str(source), stage, progress=progress, **SHARDS)


@pytest.mark.parametrize("is_journal_forged", [False, True])
def test_published_source_does_not_resume_an_upload_of_other_bytes(
    genuine: Path, forged: Path, tmp_path: Path, hub: HubServer, frequent_journal_entries: None, is_journal_forged: bool
) -> None:
    stage = tmp_path / "stage"
    interrupt_upload(forged, stage)
    if is_journal_forged:
        journal = stage / JOURNAL_NAME
        text = journal.read_text("utf-8")
        journal.write_text(text.replace('"published": false', '"published": true'), "utf-8")
        assert journal.read_text("utf-8") != text
    assert not to_hub(str(genuine), stage, **SHARDS).conversion.resumed_bytes
    expected = contents(api.convert(genuine, tmp_path / "expected", **SHARDS).output)
    sent = hub.files("ada/it")
    shards = [name for name in expected if name.endswith(".safetensors")]
    assert {name: sent[name] for name in shards} == {name: expected[name] for name in shards}
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / MANIFEST_NAME).write_bytes(sent[MANIFEST_NAME])
    assert is_published(tmp_path / "sent")


def test_published_source_resumes_its_own_upload(
    genuine: Path, tmp_path: Path, hub: HubServer, frequent_journal_entries: None
) -> None:
    interrupt_upload(genuine, tmp_path / "stage")
    done = to_hub(str(genuine), tmp_path / "stage", **SHARDS).conversion
    assert done.resumed_bytes == done.plan.shards[0].size
    assert {*hub.uploads.values()} == {1}


def test_recorded_weights_cannot_take_the_name_of_another_model(genuine: Path, tmp_path: Path) -> None:
    """The other model could have another licence."""
    manifest = manifest_of(api.convert(genuine, tmp_path / "out").output)
    manifest = dataclasses.replace(manifest, model="dinov2_vits14")
    assert published_model(without_foreign_claims(manifest)) is not None
    other = {"file": "dinov2_vitb14_pretrain.pth", "address": PUBLISHED["address"].replace("vits", "vitb")}
    source = {role: dataclasses.replace(file, **other) for role, file in manifest.source.items()}
    claim = dataclasses.replace(manifest, model="dinov2_vitb14", source=source)
    assert published_model(claim) is not None
    assert published_model(without_foreign_claims(claim)) is None
