"""Which files of a folder are read, as folders lie about: caches, variants, shards, links."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import Dinov2Config, Dinov2Model

import streamconv
from streamconv import CorruptError, NotACheckpointError, SourceError, SourceMissingError
from streamconv.tensors.evaluation import read_bytes
from tests import api
from tests.checkpoints import State, bytes_of, make_states
from tests.support import run, tiny

STATE: State = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.float16), "c": torch.zeros(1)}
SHARDS = (("a",), ("b", "c"))


def write(path: Path, state: State = STATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)


def write_shards(folder: Path, name: str, index: str = "", **metadata: object) -> None:
    """Write two shards of ``name``, such as "model-{}.bin", and the index, if it is named."""
    files = [name.format(f"{i:05}-of-00002") for i in (1, 2)]
    for file, keys in zip(files, SHARDS, strict=True):
        write(folder / file, {key: STATE[key] for key in keys})
    if index:
        weight_map = {key: file for file, keys in zip(files, SHARDS, strict=True) for key in keys}
        (folder / index).write_text(json.dumps({**metadata, "weight_map": weight_map}))


WANTED = {name: bytes_of(value) for name, value in STATE.items()}


def contents_of(place: Path, note: str = "") -> dict[str, bytes]:
    """Return the tensors' bytes, after comparing the note on which files they were read from."""
    with streamconv.open_checkpoint(place) as checkpoint:
        assert checkpoint.note == note
        return {name: read_bytes(tensor) for name, tensor in checkpoint.items()}


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "safetensors": (lambda folder: write(folder / "model.safetensors"), ""),
    "bin": (lambda folder: write(folder / "pytorch_model.bin"), ""),
    "shards": (lambda folder: write_shards(folder, "model-{}.safetensors", "model.safetensors.index.json"), ""),
    "shards of bin": (
        lambda folder: write_shards(folder, "pytorch_model-{}.bin", "pytorch_model.bin.index.json", metadata={}), "",
    ),
    "one shard": (
        lambda folder: write(folder / "model-00001-of-00001.safetensors"),
        "weights read from model-00001-of-00001.safetensors",
    ),
    "shards without an index": (
        lambda folder: write_shards(folder, "model-{}.safetensors"),
        "weights read from model-00001-of-00002.safetensors, model-00002-of-00002.safetensors",
    ),
    "six digits, and a size that is a float": (
        lambda folder: write_shards(
            folder, "model-0{}.safetensors", "model.safetensors.index.json", metadata={"total_size": 1.5e9}
        ),
        "",
    ),
    "a checkpoint named .pth.tar": (
        lambda folder: write(folder / "checkpoint.pth.tar"), "weights read from checkpoint.pth.tar",
    ),
    "a variant": (
        lambda folder: write(folder / "model.fp16.safetensors"), "weights read from model.fp16.safetensors",
    ),
    "a variant of bin": (
        lambda folder: write(folder / "pytorch_model.fp16.bin"), "weights read from pytorch_model.fp16.bin",
    ),
    "shards of a variant": (
        lambda folder: write_shards(folder, "model.fp16-{}.safetensors", "model.safetensors.index.fp16.json"),
        "weights read from the files that model.safetensors.index.fp16.json lists",
    ),
    "diffusers": (
        lambda folder: [write(folder / f"diffusion_pytorch_model.{kind}") for kind in ("safetensors", "bin")],
        "weights read from diffusion_pytorch_model.safetensors",
    ),
    "open_clip": (
        lambda folder: write(folder / "open_clip_pytorch_model.bin"),
        "weights read from open_clip_pytorch_model.bin",
    ),
    "one checkpoint of training": (
        lambda folder: [
            write(folder / name) for name in ("teacher_checkpoint.pth", "optimizer.pt", "training_args.bin")
        ],
        "weights read from teacher_checkpoint.pth",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_is_read_whatever_its_weights_are_called(tmp_path: Path, layout: str) -> None:
    make, note = LAYOUTS[layout]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    make(folder)
    assert contents_of(folder, note) == WANTED


def test_files_that_transformers_prefers_come_first(tmp_path: Path) -> None:
    names = ("model.fp16.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
    for name in (*names, "model.safetensors.index.json", "model.safetensors"):
        if name.endswith(".json"):
            kind = name.split(".")[1]
            write_shards(tmp_path, f"{name.split('.')[0]}-{{}}.{kind}", name)
        else:
            write(tmp_path / name)
        with streamconv.open_checkpoint(tmp_path) as checkpoint:
            wanted = name if not name.endswith("json") else f"{name.split('.')[0]}-00001-of-00002.{kind}"
            assert checkpoint.names[0] == wanted


def test_transformers_loads_the_same_weights_from_a_bin_folder(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    model = Dinov2Model(config)
    model.save_pretrained(tmp_path / "bin")
    safe = tmp_path / "bin" / "model.safetensors"
    torch.save(safetensors.torch.load_file(safe), tmp_path / "bin" / "pytorch_model.bin")
    safe.unlink()
    streamconv.convert(tmp_path / "bin", tmp_path / "out")
    again = Dinov2Model.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_index_as_source_opens_its_folder(tmp_path: Path) -> None:
    for kind, index in (("safetensors", "model.safetensors.index.json"), ("bin", "pytorch_model.bin.index.json")):
        write_shards(tmp_path / kind, f"x-{{}}.{kind}", index)
        assert contents_of(tmp_path / kind / index) == WANTED


def test_one_shard_as_source_names_its_folder(tmp_path: Path) -> None:
    write_shards(tmp_path, "model-{}.safetensors", "model.safetensors.index.json")
    with pytest.raises(NotACheckpointError, match=f"is one of the 2 shards .* Give their folder: {tmp_path}"):
        api.plan(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(NotACheckpointError, match=r"is one of the 163 shards .* Fetch all of them into a folder"):
        api.plan("https://example.invalid/model-00001-of-000163.safetensors", stream=True)
    torch.save(make_states(tiny())[0], tmp_path / "x-00001-of-00001.pth")
    assert api.plan(tmp_path / "x-00001-of-00001.pth").dimensions == tiny()


def test_chosen_file_is_named_in_the_plan(tmp_path: Path) -> None:
    torch.save(make_states(tiny())[0], tmp_path / "teacher_checkpoint.pth")
    assert "weights read from teacher_checkpoint.pth" in api.plan(tmp_path).notes
    assert "weights read from teacher_checkpoint.pth" in run("plan", ".", cwd=tmp_path).stdout


def test_several_files_are_listed(tmp_path: Path) -> None:
    for name in ("a.pth", "b.safetensors"):
        write(tmp_path / name)
    with pytest.raises(NotACheckpointError, match=r"holds 2 files of weights\. Give one of them: a\.pth, b\.safeten"):
        streamconv.open_checkpoint(tmp_path)


def test_index_beside_another_model_is_not_chosen(tmp_path: Path) -> None:
    write_shards(tmp_path, "model.fp16-{}.safetensors", "model.safetensors.index.fp16.json")
    write(tmp_path / "other.pth")
    with pytest.raises(NotACheckpointError, match=r"2 files of weights.*index\.fp16\.json, other\.pth"):
        streamconv.open_checkpoint(tmp_path)


@pytest.mark.parametrize("has_index", [True, False])
def test_missing_shard_is_named(tmp_path: Path, has_index: bool) -> None:
    write_shards(tmp_path, "model-{}.safetensors", "model.safetensors.index.json" if has_index else "")
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    what = "model-00001-of-00002.safetensors: there is no such file" if has_index else "first missing one is number 1"
    with pytest.raises(SourceMissingError, match=what):
        streamconv.open_checkpoint(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, "model-{}.safetensors")
    write(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(
        CorruptError, match=r"00001-of-00002.safetensors and .*00002-of-00002.safetensors both have 'a'"
    ):
        streamconv.open_checkpoint(tmp_path)


def test_folder_without_weights_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    with pytest.raises(SourceMissingError, match=r"holds no weights\. It holds README\.md\."):
        streamconv.open_checkpoint(tmp_path)
    for name in ("checkpoint-500", "checkpoint-1000"):
        write(tmp_path / name / "model.safetensors")
    with pytest.raises(SourceMissingError, match=r"Give a folder in it that does: checkpoint-1000, checkpoint-500\."):
        streamconv.open_checkpoint(tmp_path)


def test_unfinished_download_is_recognised(tmp_path: Path) -> None:
    local, cache = tmp_path / "local", tmp_path / "models--a--b"
    for folder, blobs in ((local, local / ".cache/huggingface/download"), (cache / "snapshots/abc", cache / "blobs")):
        folder.mkdir(parents=True)
        blobs.mkdir(parents=True)
        (folder / "config.json").touch()
        (blobs / "x.incomplete").touch()
        with pytest.raises(SourceMissingError, match=r"unfinished: run `hf download` again"):
            streamconv.open_checkpoint(folder)


# Links and caches


def hub_cache(folder: Path, *revisions: str) -> Path:
    """Make a repository's folder in the Hub's cache, in which snapshots link to blobs."""
    model = folder / "models--owner--name"
    (model / "blobs").mkdir(parents=True)
    write(model / "blobs" / "x.safetensors")
    for revision in revisions:
        (model / "snapshots" / revision).mkdir(parents=True)
        (model / "snapshots" / revision / "model.safetensors").symlink_to("../../blobs/x.safetensors")
    return model


def test_cache_of_the_hub_is_read_from_its_only_snapshot(tmp_path: Path) -> None:
    model = hub_cache(tmp_path, "abc")
    assert contents_of(model) == WANTED
    assert contents_of(model / "snapshots" / "abc") == WANTED
    with streamconv.open_checkpoint(model) as checkpoint:
        assert checkpoint.folder == model / "snapshots" / "abc"
    with pytest.raises(NotACheckpointError, match=r"holds 2 snapshots .* Give one of them: .*snapshots/abc or "):
        streamconv.open_checkpoint(hub_cache(tmp_path / "other", "abc", "def"))


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "all"])
def test_links_of_the_folder_are_followed(tmp_path: Path, name: str) -> None:
    """As huggingface_hub, DVC and git-annex make them, and people who keep models in one place."""
    folder, store = tmp_path / "folder", tmp_path / "store"
    write_shards(folder, "model-{}.safetensors", "model.safetensors.index.json")
    store.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        if name in (path.name, "all"):
            shutil.move(path, store / str(i))
            path.symlink_to(os.path.relpath(store / str(i), folder))
    assert contents_of(folder) == WANTED
    (tmp_path / "link").symlink_to(folder)
    assert contents_of(tmp_path / "link") == WANTED


def test_config_beside_a_link_is_read(tmp_path: Path) -> None:
    torch.save(make_states(tiny())[0], tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "out", num_heads=4)
    (tmp_path / "store").mkdir()
    shutil.move(tmp_path / "out" / "model.safetensors", tmp_path / "store" / "x")
    (tmp_path / "out" / "model.safetensors").symlink_to(tmp_path / "store" / "x")
    assert api.plan(tmp_path / "out").config["num_attention_heads"] == 4


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("../.git/annex/objects/Gk/0f/SHA256E-s8--ab.safetensors", r"Run `git annex get \S+` in its folder"),
        ("/nowhere/x", "is a link to /nowhere/x, which does not exist"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "mine.pth"])
def test_link_to_a_missing_file_is_explained(tmp_path: Path, target: str, message: str, name: str) -> None:
    if "-of-" in name:
        write_shards(tmp_path, "model-{}.safetensors", "model.safetensors.index.json")
        (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(target)
    with pytest.raises(SourceError, match=message):
        streamconv.open_checkpoint(tmp_path)
    if "-of-" not in name:
        with pytest.raises(SourceError, match=message):
            api.plan(tmp_path / name)


def test_output_is_verified_only_from_its_own_files(tmp_path: Path) -> None:
    """Files of other names, which a source may have, do not stand in for those of an output."""
    torch.save(make_states(tiny())[0], tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "out")
    state = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(SourceMissingError, match=r"holds neither model\.safetensors nor"):
        streamconv.formats.checkpoint.open_output(tmp_path / "out")
