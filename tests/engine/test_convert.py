"""Conversions: the right bytes, complete or absent."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import CorruptError, MappingError, OutputError, UsageError
from streamconv.jobs import prepare
from tests import api
from tests.checkpoints import make_states, original_mapping
from tests.support import Save, contents, flip, run_python, tiny


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("classes", [None, 7])
def test_single_file_equals_save_file_of_the_original_scripts_mapping(
    tmp_path: Path, save: Save, swiglu: bool, classes: int | None
) -> None:
    geometry = tiny(swiglu, classes)
    backbone, head = save(geometry)
    state = original_mapping(torch.load(backbone, weights_only=True), "dinov2." if classes else "")
    if head:
        state |= {f"classifier.{name}": value for name, value in torch.load(head, weights_only=True).items()}
    safetensors.torch.save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    api.convert(backbone, tmp_path / "ours", head=head)
    ours = (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()


def test_memory_layout_of_the_source_does_not_change_the_output(tmp_path: Path) -> None:
    """Channels-last, transposed, sliced and shared source tensors with equal values give equal output."""
    plain, _ = make_states(tiny())
    odd = dict(plain)
    odd["patch_embed.proj.weight"] = plain["patch_embed.proj.weight"].to(memory_format=torch.channels_last)
    odd["blocks.0.attn.qkv.weight"] = plain["blocks.0.attn.qkv.weight"].t().contiguous().t()
    wide = torch.randn(128, 2 * 512)
    wide[:, ::2] = plain["blocks.1.mlp.fc2.weight"]
    odd["blocks.1.mlp.fc2.weight"] = wide[:, ::2]
    both = torch.stack([plain["blocks.0.ls1.gamma"], plain["blocks.0.ls2.gamma"]])
    odd["blocks.0.ls1.gamma"], odd["blocks.0.ls2.gamma"] = both[0], both[1]
    odd["norm.bias"] = plain["norm.bias"] = torch.tensor(0.5).expand(128)
    for name, state in (("plain", plain), ("odd", odd)):
        torch.save(state, tmp_path / f"{name}.pth")
        api.convert(tmp_path / f"{name}.pth", tmp_path / name, max_shard_size="300KB")
    files = sorted(path.name for path in (tmp_path / "plain").glob("*.safetensors"))
    assert len(files) > 3
    for name in files:
        assert (tmp_path / "odd" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in make_states(tiny())[0].items()}
    torch.save(state, tmp_path / "x.pth")
    done = api.convert(tmp_path / "x.pth", tmp_path / "out")
    assert done.plan.config["dtype"] == str(dtype).removeprefix("torch.")
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in original_mapping(state).items())


def test_manifest_records_source_plan_and_files(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=5))
    done = api.convert(backbone, tmp_path / "out", head=head, max_shard_size="1MB")
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_text())
    assert manifest["source"]["backbone"]["file"] == "source.pth"
    assert manifest["source"]["backbone"]["size"] == backbone.stat().st_size
    assert manifest["plan"] == done.plan.fingerprint
    assert manifest["files"].keys() == {p.name for p in (tmp_path / "out").iterdir()} - {"streamconv.json"}
    assert sum(name.endswith(".safetensors") for name in manifest["files"]) > 1
    for name, shard in manifest["files"].items():
        path = tmp_path / "out" / name
        digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
        assert (shard["size"], shard["sha256"]) == (path.stat().st_size, digest)


def test_seconds_are_those_of_writing(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    reports: list[float] = []

    def slow(step: str, done: int, total: int, unit: str) -> None:
        reports.append(0.05)
        time.sleep(0.05)

    start = time.monotonic()
    first = api.convert(backbone, tmp_path / "out", progress=slow)
    assert sum(reports) <= first.seconds <= time.monotonic() - start
    assert api.convert(backbone, tmp_path / "out").seconds == 0
    start = time.monotonic()
    reverted = streamconv.revert(tmp_path / "out", tmp_path / "back.pth", progress=slow)
    assert 0.05 <= reverted.as_dict()["seconds"] <= time.monotonic() - start


def test_finished_folder_is_left_as_it_is(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    first = api.convert(backbone, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    renamed = backbone.rename(tmp_path / "renamed.pth")
    second = api.convert(renamed, tmp_path / "out")
    assert (first.was_finished, second.was_finished) == (False, True)
    assert first.shards == second.shards
    assert second.resumed_bytes == 0
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_same_source_gives_the_same_folder(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    for name in ("one", "two"):
        api.convert(backbone, tmp_path / name, max_shard_size="300KB")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_output_folder_of_another_conversion_is_refused(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    before = contents(tmp_path / "out")
    other, _ = save(tiny(swiglu=True), "other")
    with pytest.raises(OutputError, match="holds another conversion, of an unnamed model: its backbone"):
        api.convert(other, tmp_path / "out")
    with pytest.raises(OutputError, match="shard size"):
        api.convert(backbone, tmp_path / "out", max_shard_size="100KB")
    assert contents(tmp_path / "out") == before


def test_files_that_streamconv_did_not_write_are_not_overwritten(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(OutputError, match=r"config\.json, which streamconv did not write"):
        api.convert(backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == {"config.json": b"mine"}


def test_unrelated_files_in_the_folder_are_kept(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    api.convert(backbone, tmp_path / "out")
    assert contents(tmp_path / "out")["notes.txt"] == b"mine"


def test_finished_folder_keeps_its_default_labels(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, head = save(tiny(classes=1000))
    api.convert(backbone, tmp_path / "out", head=head)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(prepare, "imagenet_labels", lambda: ([f"name {i}" for i in range(1000)], "the Hub"))
    again = api.convert(backbone, tmp_path / "out", head=head)
    assert again.was_finished
    assert again.labels_from is not None
    assert again.labels_from.startswith("torchvision's list")  # the folder's, not the ones that would be chosen now
    (tmp_path / "labels.txt").write_text("\n".join(f"mine {i}" for i in range(1000)) + "\n\n")
    with pytest.raises(OutputError, match="list of labels"):
        api.convert(backbone, tmp_path / "out", head=head, labels=tmp_path / "labels.txt")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(tmp_path: Path, save: Save, umask: int) -> None:
    backbone, _ = save(tiny())
    before = os.umask(umask)
    try:
        api.convert(backbone, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("tensor", ["mask_token", "blocks.1.attn.qkv.weight", "norm.bias"])
def test_flipped_bit_in_the_source_is_found_and_no_output_is_left(tmp_path: Path, save: Save, tensor: str) -> None:
    backbone, _ = save(tiny())
    flip(backbone, tensor, 100)
    record = list(torch.load(backbone, weights_only=True)).index(tensor)  # torch itself does not notice it
    with pytest.raises(CorruptError, match=rf"data/{record}, bytes .* CRC-32\. Fetch the file again"):
        api.convert(backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(CorruptError):
        api.convert(backbone, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_flipped_bit_is_found_in_a_record_that_two_shards_share(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    flip(backbone, "blocks.1.attn.qkv.weight", 10)  # in the query's rows
    with pytest.raises(CorruptError, match=r"attention\.attention\.key"):  # the first to read the record
        api.convert(backbone, tmp_path / "out", max_shard_size="100KB")
    written = {path.name for path in (tmp_path / "out").iterdir()} - {".streamconv-journal"}
    assert written
    assert all(name.endswith(".safetensors") and not name.startswith(".") for name in written)


def test_source_without_crcs_is_converted_and_reported_as_unchecked(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(make_states(tiny())[0], tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert not api.convert(tmp_path / "x.pth", tmp_path / "out").is_crc_checked


def test_full_disk_is_reported_before_and_during_writing(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, _ = save(tiny())
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=9, f_bavail=1000, f_frsize=1))
        with pytest.raises(OutputError, match="Make room"):
            api.convert(backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match="No space left on device"):
            api.convert(backbone, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (tmp_path / "made before").mkdir()
        with pytest.raises(OutputError, match="No space left on device"):
            api.convert(backbone, tmp_path / "made before")
        assert list((tmp_path / "made before").iterdir()) == []


def test_short_writes_are_completed(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "whole")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: max(1, len(data) // 2)], offset))
    api.convert(backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_output_folder_that_cannot_be_created_is_an_error(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    for folder in (backbone, backbone / "out"):
        with pytest.raises(OutputError):
            api.convert(backbone, folder)


def test_nothing_is_written_for_an_incomplete_source(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    del state["cls_token"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(MappingError):
        api.convert(tmp_path / "x.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("nest", [
    lambda head: {"model": {f"linear.{key}": tensor for key, tensor in head.items()}, "iteration": 5},
    lambda head: {f"module.fc.{key}": tensor for key, tensor in head.items()},
])  # fmt: skip
def test_head_is_found_under_a_prefix(tmp_path: Path, save: Save, nest: Callable[[Any], Any]) -> None:
    backbone, _ = save(tiny())
    head = {"weight": torch.randn(7, 256), "bias": torch.randn(7)}
    torch.save(head, tmp_path / "plain.pth")
    torch.save(nest(head), tmp_path / "nested.pth")
    wanted = api.convert(backbone, tmp_path / "wanted", head=tmp_path / "plain.pth")
    assert api.convert(backbone, tmp_path / "out", head=tmp_path / "nested.pth").shards == wanted.shards


def test_file_that_is_not_a_head_is_refused(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    with pytest.raises(MappingError, match="is not a classifier's head"):
        api.convert(backbone, tmp_path / "out", head=backbone)
    for names in (("a.weight", "b.bias"), ("weight", "b.bias")):
        torch.save(dict(zip(names, (torch.zeros(7, 256), torch.zeros(7)), strict=True)), tmp_path / "two.pth")
        with pytest.raises(MappingError, match=r"is not a classifier's head.*torch\.save"):
            api.convert(backbone, tmp_path / "out", head=tmp_path / "two.pth")
    torch.save({"weight": torch.zeros(7, 256), "bias": torch.zeros(7)}, tmp_path / "head.pth")
    with pytest.raises(MappingError, match=r"is a classifier's head. Give it with --head"):
        api.plan(tmp_path / "head.pth")
    torch.save({"weight": torch.zeros(7, 128), "bias": torch.zeros(7)}, tmp_path / "narrow.pth")
    with pytest.raises(MappingError, match=r"wrong shape: linear_head\.weight is \[7, 128\], not \[7, 256\]"):
        api.convert(backbone, tmp_path / "out", head=tmp_path / "narrow.pth")


def test_labels_without_a_classifier_are_refused(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    (tmp_path / "labels.txt").write_text("a\n")
    with pytest.raises(UsageError, match="--head"):
        api.convert(backbone, tmp_path / "out", labels=tmp_path / "labels.txt")


def test_progress_counts_every_byte_once(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    seen: list[tuple[int, int]] = []
    done = api.convert(
        backbone,
        tmp_path / "out",
        max_shard_size="500KB",
        progress=lambda what, at, total, unit: seen.append((at, total)),
    )
    assert [at for at, _ in seen] == sorted({at for at, _ in seen})
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert seen[-1] == (size, size)
    assert done.resumed_bytes == 0


def test_converting_imports_nothing_large(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=3))
    code = (
        "import sys\nfrom streamconv.cli.commands import app\n"
        f"words = ['convert', {str(backbone)!r}, '--head', {str(head)!r}, '-o', {str(tmp_path / 'out')!r}]\n"
        "app(words, standalone_mode=False)\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'accelerate', 'torchvision') if m in sys.modules])"
    )
    assert run_python(code).splitlines()[-1] == "[]"
    assert (tmp_path / "out" / "model.safetensors").exists()
