"""Conversions as their users see them: the right bytes, whole or absent, in little memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import streamconv
from streamconv import CorruptError, MappingError, OutputError, UsageError
from tests.conftest import make_states, run_python, seeds_mapping, tiny

Save = Callable[..., tuple[Path, Path | None]]


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("classes", [None, 7])
def test_one_file_is_what_save_file_makes_of_the_seeds_mapping(
    tmp_path: Path, save: Save, swiglu: bool, classes: int | None
) -> None:
    geometry = tiny(swiglu, classes)
    backbone, head = save(geometry)
    state = seeds_mapping(torch.load(backbone, weights_only=True), "dinov2." if classes else "")
    if head:
        state |= {f"classifier.{name}": value for name, value in torch.load(head, weights_only=True).items()}
    safetensors.torch.save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    streamconv.convert(backbone, tmp_path / "ours", head=head)
    ours = (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 cuts shards in another order; ours is 5's")
@pytest.mark.parametrize("limit", ["150KB", "1MB", "5GB"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_folder_is_what_save_pretrained_writes(tmp_path: Path, save: Save, limit: str, swiglu: bool) -> None:
    backbone, _ = save(tiny(swiglu, layers=11))
    done = streamconv.convert(backbone, tmp_path / "ours", max_shard_size=limit)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**done.plan.config))
    state = seeds_mapping(torch.load(backbone, weights_only=True))
    model = transformers.Dinov2Model.from_pretrained(None, config=model.config, state_dict=state)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    names = {path.name for path in (tmp_path / "theirs").iterdir()} - {"config.json"}
    ours = {path.name for path in (tmp_path / "ours").iterdir()}
    assert ours == names | {"config.json", "preprocessor_config.json", "streamconv.json"}
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_odd_layouts_of_the_source_give_the_same_bytes(tmp_path: Path) -> None:
    """Channels-last, transposed, sliced and shared source tensors; the same values, the same output."""
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
        streamconv.convert(tmp_path / f"{name}.pth", tmp_path / name, max_shard_size="300KB")
    files = sorted(path.name for path in (tmp_path / "plain").glob("*.safetensors"))
    assert len(files) > 3
    for name in files:
        assert (tmp_path / "odd" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions_stay_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in make_states(tiny())[0].items()}
    torch.save(state, tmp_path / "x.pth")
    done = streamconv.convert(tmp_path / "x.pth", tmp_path / "out")
    assert done.plan.config["dtype"] == str(dtype).removeprefix("torch.")
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in seeds_mapping(state).items())


def test_the_manifest_tells_where_everything_came_from(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=5))
    done = streamconv.convert(backbone, tmp_path / "out", head=head, max_shard_size="1MB")
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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_converting_twice_leaves_the_first(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    first = streamconv.convert(backbone, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    renamed = backbone.rename(tmp_path / "renamed.pth")
    second = streamconv.convert(renamed, tmp_path / "out")
    assert (first.was_finished, second.was_finished) == (False, True)
    assert first.shards == second.shards
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_the_same_source_gives_the_same_folder(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    for name in ("one", "two"):
        streamconv.convert(backbone, tmp_path / name, max_shard_size="300KB")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_models_output_is_refused(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")
    before = contents(tmp_path / "out")
    other, _ = save(tiny(swiglu=True), "other")
    with pytest.raises(OutputError, match="holds another conversion, of an unnamed model: its backbone"):
        streamconv.convert(other, tmp_path / "out")
    with pytest.raises(OutputError, match="shard size"):
        streamconv.convert(backbone, tmp_path / "out", max_shard_size="100KB")
    assert contents(tmp_path / "out") == before


def test_files_that_are_not_ours_are_refused(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(OutputError, match=r"config\.json, which streamconv did not write"):
        streamconv.convert(backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == {"config.json": b"mine"}


def test_other_files_in_the_folder_stay(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    streamconv.convert(backbone, tmp_path / "out")
    assert contents(tmp_path / "out")["notes.txt"] == b"mine"


def test_labels_by_default_may_come_from_elsewhere_next_time(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, head = save(tiny(classes=1000))
    streamconv.convert(backbone, tmp_path / "out", head=head)
    before = contents(tmp_path / "out")
    module = sys.modules["streamconv.jobs.convert"]
    monkeypatch.setattr(module, "imagenet_labels", lambda: ([f"name {i}" for i in range(1000)], "the Hub"))
    again = streamconv.convert(backbone, tmp_path / "out", head=head)
    assert again.was_finished
    assert again.labels_from is not None
    assert again.labels_from.startswith("torchvision's list")  # the folder's, not what would be taken now
    (tmp_path / "labels.txt").write_text("\n".join(f"mine {i}" for i in range(1000)) + "\n\n")
    with pytest.raises(OutputError, match="list of labels"):
        streamconv.convert(backbone, tmp_path / "out", head=head, labels=tmp_path / "labels.txt")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_the_umasks_choice(tmp_path: Path, save: Save, umask: int) -> None:
    backbone, _ = save(tiny())
    before = os.umask(umask)
    try:
        streamconv.convert(backbone, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


def flip(path: Path, tensor: str, byte: int) -> None:
    with streamconv.open_checkpoint(path) as checkpoint:
        at = checkpoint[tensor].record.range.start + byte
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("tensor", ["mask_token", "blocks.1.attn.qkv.weight", "norm.bias"])
def test_a_flipped_bit_of_the_source_is_found_and_nothing_is_left(tmp_path: Path, save: Save, tensor: str) -> None:
    backbone, _ = save(tiny())
    flip(backbone, tensor, 100)
    record = list(torch.load(backbone, weights_only=True)).index(tensor)  # torch itself notices nothing
    with pytest.raises(CorruptError, match=rf"data/{record}, bytes .* CRC-32\. Fetch the file again"):
        streamconv.convert(backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(CorruptError):
        streamconv.convert(backbone, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_flipped_bit_is_found_in_a_record_that_two_shards_share(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    flip(backbone, "blocks.1.attn.qkv.weight", 10)  # in the query's rows
    with pytest.raises(CorruptError, match=r"attention\.attention\.key"):  # the first to draw on the record
        streamconv.convert(backbone, tmp_path / "out", max_shard_size="100KB")
    written = {path.name for path in (tmp_path / "out").iterdir()} - {".streamconv-journal"}
    assert written
    assert all(name.endswith(".safetensors") and not name.startswith(".") for name in written)


def test_a_source_without_crcs_is_converted_and_says_so(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(make_states(tiny())[0], tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert not streamconv.convert(tmp_path / "x.pth", tmp_path / "out").is_crc_checked


def test_a_full_disk_is_noticed_before_and_while_writing(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, _ = save(tiny())
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OutputError, match="Make room"):
            streamconv.convert(backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match="No space left on device"):
            streamconv.convert(backbone, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (tmp_path / "made before").mkdir()
        with pytest.raises(OutputError, match="No space left on device"):
            streamconv.convert(backbone, tmp_path / "made before")
        assert list((tmp_path / "made before").iterdir()) == []


def test_short_writes_are_finished(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "whole")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: max(1, len(data) // 2)], offset))
    streamconv.convert(backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    for folder in (backbone, backbone / "out"):
        with pytest.raises(OutputError):
            streamconv.convert(backbone, folder)


def test_nothing_is_written_for_a_source_that_does_not_fit(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    del state["cls_token"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(MappingError):
        streamconv.convert(tmp_path / "x.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_head_is_refused(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    with pytest.raises(MappingError, match="is no linear head"):
        streamconv.convert(backbone, tmp_path / "out", head=backbone)
    torch.save({"weight": torch.zeros(7, 128), "bias": torch.zeros(7)}, tmp_path / "narrow.pth")
    with pytest.raises(MappingError, match=r"misshaped: linear_head\.weight is \[7, 128\], not \[7, 256\]"):
        streamconv.convert(backbone, tmp_path / "out", head=tmp_path / "narrow.pth")


def test_labels_without_a_classifier_are_refused(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    (tmp_path / "labels.txt").write_text("a\n")
    with pytest.raises(UsageError, match="--head"):
        streamconv.convert(backbone, tmp_path / "out", labels=tmp_path / "labels.txt")


def test_progress_counts_every_byte_once(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    seen: list[tuple[int, int]] = []
    done = streamconv.convert(
        backbone,
        tmp_path / "out",
        max_shard_size="500KB",
        progress=lambda what, at, total, unit: seen.append((at, total)),
    )
    assert [at for at, _ in seen] == sorted({at for at, _ in seen})
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert seen[-1] == (size, size)
    assert done.resumed_bytes == 0


def peak_kb(code: str) -> int:
    """VmHWM of a fresh Python that runs ``code``."""
    return int(run_python(code + "\nprint(*(l.split()[1] for l in open('/proc/self/status') if l[:5] == 'VmHWM'))"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
def test_memory_does_not_grow_with_the_model(tmp_path: Path, save: Save) -> None:
    small, _ = save(tiny(), "small")
    large, _ = save(tiny(layers=24, hidden=1024), "large")  # 1.2 GB, as ViT-L
    assert large.stat().st_size > 1000 * 2**20 > 100 * small.stat().st_size
    peaks = [
        peak_kb(f"import streamconv; streamconv.convert({str(source)!r}, {str(tmp_path / source.stem)!r})")
        for source in (small, large)
    ]
    assert peaks[1] < 32 * 1024
    # The buffers that a small model does not fill, and 20 times the keys.
    assert peaks[1] - peaks[0] < 8 * 1024


def test_a_conversion_imports_nothing_large(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=3))
    code = (
        "import sys\nfrom streamconv.cli import app\n"
        f"words = ['convert', {str(backbone)!r}, '--head', {str(head)!r}, '-o', {str(tmp_path / 'out')!r}]\n"
        "app(words, standalone_mode=False)\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'accelerate', 'torchvision') if m in sys.modules])"
    )
    assert run_python(code).splitlines()[-1] == "[]"
    assert (tmp_path / "out" / "model.safetensors").exists()
