"""Reverting: what was converted comes back byte for byte."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import (
    ChangedError,
    CorruptError,
    MappingError,
    OutputError,
    SourceError,
    SourceMissingError,
    UsageError,
)
from streamconv.families.registry import find_model
from tests import api
from tests.checkpoints import assert_same, chunked, converted_folder, original_states
from tests.support import Faults, contents, run, run_python, save_zeros, sha256_of, tiny


# Any two of the five properties meet in every way.
@pytest.mark.parametrize(
    ("swiglu", "registers", "classes", "limit", "suffix"),
    [(False, 0, None, "5GB", ".pth"), (False, 0, 7, "300KB", ".safetensors"), (False, 3, None, "300KB", ".safetensors"),
     (False, 3, 7, "5GB", ".pth"), (True, 0, None, "300KB", ".pth"), (True, 0, 7, "5GB", ".safetensors"),
     (True, 3, None, "5GB", ".safetensors"), (True, 3, 7, "300KB", ".pth")],
)  # fmt: skip
def test_reverting_restores_the_original_bytes(
    tmp_path: Path, swiglu: bool, registers: int, classes: int | None, limit: str, suffix: str
) -> None:
    geometry = tiny(swiglu, classes, registers=registers, layers=11)
    folder = converted_folder(tmp_path, geometry, max_shard_size=limit)
    assert (folder / "model.safetensors").exists() == (limit == "5GB")
    head_path = tmp_path / f"head{suffix}" if classes else None
    done = streamconv.revert(folder, tmp_path / f"back{suffix}", head=head_path)
    backbone, head = original_states(geometry)
    assert_same(backbone, tmp_path / f"back{suffix}")
    if head_path:
        assert_same(head, head_path)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", *(path.name for path in done.files)}
    assert done.weights == sum(value.nbytes for value in (*backbone.values(), *head.values()))
    assert done.shaped_like is None


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_reverting_keeps_other_dtypes(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    folder = converted_folder(tmp_path, tiny(), dtype)
    streamconv.revert(folder, tmp_path / f"back{suffix}")
    assert_same(original_states(tiny(), dtype)[0], tmp_path / f"back{suffix}")


def test_records_are_aligned_whatever_the_file_name(tmp_path: Path) -> None:
    folder = converted_folder(tmp_path, tiny())
    streamconv.revert(folder, tmp_path / "modèle größer.pth")
    assert_same(original_states(tiny())[0], tmp_path / "modèle größer.pth")
    with streamconv.open_checkpoint(tmp_path / "modèle größer.pth") as checkpoint:
        assert all(tensor.record.range.start % 64 == 0 for tensor in checkpoint.values())
        assert all(tensor.record.crc32 is not None for tensor in checkpoint.values())


def test_published_model_is_identified_and_restored(tmp_path: Path) -> None:
    streamconv.synth("dinov2_vits14_reg", tmp_path / "source.pth")
    api.convert(tmp_path / "source.pth", tmp_path / "folder")
    (tmp_path / "back").mkdir()
    done = run("revert", "folder", "-o", "back/source.pth", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size, digest = (tmp_path / "source.pth").stat().st_size, sha256_of(tmp_path / "source.pth")
    assert json.loads(done.stdout)["shaped_like"] == "dinov2_vits14_reg"
    assert json.loads(done.stdout)["files"] == [{"file": "back/source.pth", "bytes": size, "sha256": digest}]
    assert (tmp_path / "back" / "source.pth").read_bytes() == (tmp_path / "source.pth").read_bytes()


def test_reverting_lists_all_problems_at_once(tmp_path: Path) -> None:
    folder = converted_folder(tmp_path, tiny())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["encoder.layer.1.attention.attention.key.weight"]
    state["encoder.layer.2.attention.attention.value.bias"] = torch.zeros(127)
    state["encoder.layer.0.norm1.bias"] = torch.zeros(128, dtype=torch.float16)
    state["pooler.weight"] = torch.zeros(1)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(MappingError, match=r"folder does not fit \(4 problems\)") as caught:
        streamconv.revert(folder, tmp_path / "back.pth")
    assert sorted(caught.value.problems) == [
        "missing: encoder.layer.1.attention.attention.key.weight [128, 128]",
        "mixed dtypes: F32 (embeddings.cls_token and 58 more) and F16 (encoder.layer.0.norm1.bias); a model has one",
        "unexpected: pooler.weight [1]",
        "wrong shape: encoder.layer.2.attention.attention.value.bias is [127], not [128]",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_two_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = converted_folder(tmp_path, tiny())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state |= {f"dinov2.{name}": value.clone() for name, value in state.items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(MappingError, match=r"unexpected: dinov2\.embeddings\.cls_token"):
        streamconv.revert(folder, tmp_path / "back.pth")


def test_folders_and_paths_that_cannot_be_reverted_are_refused_with_a_fix(tmp_path: Path) -> None:
    folder = converted_folder(tmp_path, tiny())
    data = (folder / "model.safetensors").read_bytes()
    for name, damaged in (("cut", data[:-1]), ("damaged", data[:100] + b"}" + data[101:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(damaged)
    for name, state in (
        ("bert", {f"bert.encoder.layer.{i}.weight": torch.zeros(1) for i in range(9)}),
        ("original", original_states(tiny())[0]),
        ("whole", {k: v.to(torch.int32) for k, v in safetensors.torch.load_file(folder / "model.safetensors").items()}),
    ):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(state, tmp_path / name / "model.safetensors")
    (tmp_path / "classifier").mkdir()
    converted_folder(tmp_path / "classifier", tiny(classes=3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.pth").write_bytes(b"mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for error, message, name, output, head in (
        (SourceMissingError, "none is not a folder. Give the folder", "none", "x.pth", None),
        (SourceMissingError, "is not a folder. Give the folder", "folder/model.safetensors", "x.pth", None),
        (SourceMissingError, "holds no weights. It is empty", "empty", "x.pth", None),
        (streamconv.TruncatedError, "Fetch it again", "cut", "x.pth", None),
        (CorruptError, "has no dtype, shape or data_offsets for", "damaged", "x.pth", None),
        (MappingError, r"\(.*dinov2.*\). It holds:\n  bert.encoder.layer.0.weight\n", "bert", "x.pth", None),
        (MappingError, r"\(.*dinov2.*\). It holds:\n", "original", "x.pth", None),
        (MappingError, "wrong dtype: embeddings.cls_token and 60 more in I32", "whole", "x.pth", None),
        (
            OutputError,
            "there.pth exists already. Choose another .* with --force",
            "folder",
            "there.pth",
            None,
        ),
        (OutputError, "there.pth exists already", "classifier/folder", "x.pth", "there.pth"),
        (OutputError, "exists already", "folder", "folder/model.safetensors", None),
        (OutputError, "none is not a folder. Create it first", "folder", "none/x.pth", None),
        (UsageError, "taken for one of .* Choose another folder", "folder", "folder/x.pth", None),
        (UsageError, "Use one of .pth, .pt, .bin, .safetensors", "folder", "x.onnx", None),
        (UsageError, "Use one of .pth", "folder", "x", None),
        (UsageError, "Use one of .pth", "classifier/folder", "x.pth", "head"),
        (UsageError, "is a classifier, .* --head FILE", "classifier/folder", "x.pth", None),
        (UsageError, "is not a classifier .* Omit --head", "folder", "x.pth", "y.pth"),
        (UsageError, "Give --head another name", "classifier/folder", "x.pth", "./x.pth"),
    ):
        with pytest.raises(error, match=message):
            streamconv.revert(tmp_path / name, tmp_path / output, head=head and f"{tmp_path}/{head}")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, (name, output)


def test_revert_mistakes_end_in_one_message_and_an_exit_code(tmp_path: Path) -> None:
    converted_folder(tmp_path, tiny())
    (tmp_path / "there.pth").touch()
    for code, message, words in (
        (2, "Missing option", ("folder",)),
        (2, "name is empty", ("folder", "-o", "")),
        (2, "Omit --head", ("folder", "-o", "x.pth", "--head", "y.pth")),
        (3, "is not a folder", ("none", "-o", "x.pth")),
        (4, "exists already", ("folder", "-o", "there.pth")),
    ):
        done = run("revert", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, ""), (words, done.stderr)
        assert message in done.stderr, words
        assert "Traceback" not in done.stderr, words
    done = run("revert", "folder", "-o", "x.pth", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "writing x.pth\n")
    assert re.search(r"reverted into x\.pth, .* MB/s\n  x\.pth  .*  sha256 [0-9a-f]{12}\n", done.stdout)
    assert "\n  the folder's files were not verified first" in done.stdout


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("file", "left"), [("x", ()), ("head", ("incomplete", "journal"))])
def test_interrupted_revert_leaves_only_what_the_same_command_resumes(
    tmp_path: Path, suffix: str, file: str, left: tuple[str, ...]
) -> None:
    folder = converted_folder(tmp_path, tiny(classes=900))
    code = (
        "import os, signal, sys, streamconv.__main__ as cli, streamconv.cli.progress_bar as bar\n"
        "def progress(self, what, done, total, unit):\n"
        f"    if what == 'writing {file}{suffix}': os.kill(os.getpid(), signal.SIGTERM)\n"
        "bar.ProgressReport.__call__ = progress\n"
        f"sys.argv = ['streamconv', 'revert', {str(folder)!r}, '-o', 'x{suffix}', '--head', 'head{suffix}']\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "")
    command = done.stderr.removeprefix("Interrupted. To resume, run\n  streamconv ").splitlines()[0].split()
    assert command[0] == "revert"
    names = {f".x{suffix}.streamconv-{kind}" for kind in left}
    assert {path.name for path in tmp_path.iterdir()} == {"folder", *names}
    again = json.loads(run(*command, "--json", cwd=tmp_path).stdout)
    assert again["resumed_bytes"] == (again["files"][0]["bytes"] if left else 0)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", f"x{suffix}", f"head{suffix}"}


class Interrupted(BaseException):
    pass


def interrupt_after(share: float, folder: Path, *paths: Path) -> None:
    """Revert, and stop as Ctrl-C does when a share of the bytes is written."""

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if done > share * total:
            raise Interrupted

    with pytest.raises(Interrupted):
        streamconv.revert(folder, paths[0], head=paths[1] if paths[1:] else None, progress=progress)


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])  # the last one within the head
def test_interrupted_revert_is_resumed_to_the_same_bytes(tmp_path: Path, suffix: str, share: float) -> None:
    folder = converted_folder(tmp_path, tiny(classes=900))
    undisturbed, out = ([tmp_path / name / f"{part}{suffix}" for part in ("x", "head")] for name in ("whole", "out"))
    for path in (undisturbed[0], out[0]):
        path.parent.mkdir()
    whole = streamconv.revert(folder, undisturbed[0], head=undisturbed[1])
    interrupt_after(share, folder, *out)
    assert not any(path.exists() for path in out)
    seen: list[str] = []
    done = streamconv.revert(folder, out[0], head=out[1], progress=lambda what, *rest: seen.append(what))
    total = sum(path.stat().st_size for path in out)
    assert share * total - 3 * (32 << 10) < done.resumed_bytes < (share + 0.02) * total
    assert seen[0] == f"checking x{suffix}"
    for path, state in zip(out, original_states(tiny(classes=900)), strict=True):
        assert_same(state, path)
    assert contents(out[0].parent) == contents(undisturbed[0].parent)
    assert [file.sha256 for file in done.written.values()] == [sha256_of(path) for path in out]
    assert [file.sha256 for file in whole.written.values()] == [sha256_of(path) for path in undisturbed]


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("damage", ["a bit", "its end"])
def test_damaged_partial_file_is_written_again(tmp_path: Path, damage: str) -> None:
    folder = converted_folder(tmp_path, tiny())
    interrupt_after(0.6, folder, tmp_path / "back.pth")
    partial = tmp_path / ".back.pth.streamconv-incomplete"
    data = bytearray(partial.read_bytes())
    data[len(data) // 3] ^= 1
    partial.write_bytes(data if damage == "a bit" else data[: len(data) // 4])
    assert streamconv.revert(folder, tmp_path / "back.pth").resumed_bytes == 0
    assert_same(original_states(tiny())[0], tmp_path / "back.pth")


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("change", ["weights", "time", "chunks", "head"])
def test_partial_file_of_another_source_is_written_again(tmp_path: Path, change: str) -> None:
    folder = converted_folder(tmp_path, tiny(classes=3))
    head, options = tmp_path / "head.pth", {}
    interrupt_after(0.5, folder, tmp_path / "back.pth", head)
    path = folder / "model.safetensors"
    if change == "weights":
        state = safetensors.torch.load_file(path)
        safetensors.torch.save_file({name: value + 1 for name, value in state.items()}, path)
    elif change == "time":
        os.utime(path, (5, 5))
    elif change == "chunks":
        options["block_chunks"] = 1
    else:
        head = tmp_path / "other.pth"
    resumed = streamconv.revert(folder, tmp_path / "back.pth", head=head, **options).resumed_bytes
    assert resumed == 0
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "whole").mkdir()
    streamconv.revert(
        tmp_path / "copy", tmp_path / "whole" / "back.pth", head=tmp_path / "whole" / head.name, **options
    )
    assert contents(tmp_path / "whole") == {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}


def half_reverted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> tuple[Path, tuple[Path, Path]]:
    """Revert a folder, and stop when ``count`` of the two files have their names; return the folder and the files."""
    folder, paths = converted_folder(tmp_path, tiny(classes=3)), (tmp_path / "back.pth", tmp_path / "head.pth")
    real, renamed = os.replace, 0

    def replace(old: Path, new: Path) -> None:
        nonlocal renamed
        if renamed < count:
            real(old, new)
            renamed += 1
        if renamed == count:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Interrupted):
            streamconv.revert(folder, paths[0], head=paths[1])
    assert sum(path.exists() for path in paths) == count
    return folder, paths


def names_when_reverted(tmp_path: Path, paths: tuple[Path, Path]) -> set[str]:
    """Return what is in the folder above, after comparing the files with what was converted."""
    for path, state in zip(paths, original_states(tiny(classes=3)), strict=True):
        assert_same(state, path)
    return {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("count", [1, 2])
def test_revert_stopped_between_renames_is_finished_by_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    folder, paths = half_reverted(tmp_path, monkeypatch, count)
    streamconv.revert(folder, paths[0], head=paths[1])
    assert names_when_reverted(tmp_path, paths) == {"folder", "back.pth", "head.pth"}


def test_file_put_in_the_place_of_a_finished_one_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, paths = half_reverted(tmp_path, monkeypatch)
    for mine in (b"mine", b"m" * paths[1].stat().st_size):
        paths[1].write_bytes(mine)
        with pytest.raises(OutputError, match=r"head\.pth exists already"):
            streamconv.revert(folder, paths[0], head=paths[1])
        assert paths[1].read_bytes() == mine


def test_revert_stopped_between_renames_starts_over_if_the_folder_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hard link to a file, or another mode, changes its time as well."""
    folder, paths = half_reverted(tmp_path, monkeypatch)
    os.utime(folder / "model.safetensors", (5, 5))
    assert streamconv.revert(folder, paths[0], head=paths[1]).resumed_bytes == 0
    assert names_when_reverted(tmp_path, paths) == {"folder", "back.pth", "head.pth"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_revert_killed_at_any_rename_or_removal_is_finished_by_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    folder = converted_folder(tmp_path, tiny(classes=3))
    left = []
    for at in range(4):  # the head, the backbone, the journal; then nothing is left to be killed
        (tmp_path / str(at)).mkdir()
        paths = tmp_path / str(at) / f"x{suffix}", tmp_path / str(at) / f"head{suffix}"
        with monkeypatch.context() as patch, suppress(Interrupted):
            calls = count()
            for name in ("replace", "unlink"):
                patch.setattr(os, name, dies_at(at, calls, getattr(os, name)))
            streamconv.revert(folder, paths[0], head=paths[1])
        left.append([path.exists() for path in (*paths, paths[0].with_name(f".x{suffix}.streamconv-journal"))])
        streamconv.revert(folder, paths[0], head=paths[1], force=at == 3)
        assert contents(paths[0].parent) == contents(tmp_path / "0")
    assert left == [[False, False, True], [False, True, True], [True, True, True], [True, True, False]]
    assert {path.name for path in (tmp_path / "0").iterdir()} == {f"x{suffix}", f"head{suffix}"}


def dies_at(at: int, calls: Iterator[int], real: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does nothing more from call number ``at`` on, as in a process that was killed."""

    def call(*args: Any) -> Any:
        if next(calls) >= at:
            raise Interrupted
        return real(*args)

    return call


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])  # on the way, at the end
def test_file_that_cannot_be_synced_is_not_renamed_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder = converted_folder(tmp_path, tiny(classes=3))
    monkeypatch.setattr("streamconv.output.writer.SYNC_BYTES", 2 << 20)
    Faults(monkeypatch, (call,), errno.EIO)
    with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
        streamconv.revert(folder, tmp_path / "x.pth", head=tmp_path / "head.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("reserves", [True, False])
def test_full_disk_leaves_no_reverted_file(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, reserves: bool, suffix: str
) -> None:
    folder = converted_folder(tmp_path, tiny())
    filler, path = small_disk / "filler", small_disk / f"x{suffix}"
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate")

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if done > 0.4 * total and not filler.exists():
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 12)):
                    pass

    if reserves:  # all of the file's room, when it begins
        streamconv.revert(folder, path, progress=progress)
        assert_same(original_states(tiny())[0], path)
        path.unlink()
    else:
        with pytest.raises(OutputError, match=r"No space left on device\. Make room and run the same command again"):
            streamconv.revert(folder, path, progress=progress)
    assert [each.name for each in small_disk.iterdir()] == ["filler"]
    with filler.open("ab") as file, suppress(OSError):
        file.write(bytes(3 << 20))
    with pytest.raises(OutputError, match=r"needs [\d,]+ bytes and its disk has [\d,]+ free\. Make room"):
        streamconv.revert(folder, path)
    filler.unlink()
    streamconv.revert(folder, path)
    assert_same(original_states(tiny())[0], path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_folder_that_changes_while_it_is_reverted_is_refused(tmp_path: Path, suffix: str) -> None:
    folder = converted_folder(tmp_path, tiny())

    def progress(what: str, done: int, total: int, unit: str) -> None:
        os.utime(folder / "model.safetensors", ns=(0, done))

    with pytest.raises(ChangedError, match="was changed while it was read"):
        streamconv.revert(folder, tmp_path / f"back{suffix}", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_second_revert_to_the_same_file_is_refused(tmp_path: Path) -> None:
    folder = converted_folder(tmp_path, tiny())
    is_first: Iterator[Any] = iter([True])

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if next(is_first, False):
            with pytest.raises(OutputError, match=rf"back\.pth is being written by process {os.getpid()} on"):
                streamconv.revert(folder, tmp_path / "back.pth")

    streamconv.revert(folder, tmp_path / "back.pth", progress=progress)
    assert_same(original_states(tiny())[0], tmp_path / "back.pth")


def test_revert_progress_counts_every_byte_once(tmp_path: Path) -> None:
    folder = converted_folder(tmp_path, tiny(classes=900), max_shard_size="300KB")
    seen: list[tuple[str, int, int]] = []
    done = streamconv.revert(
        folder,
        tmp_path / "back.pth",
        head=tmp_path / "head.safetensors",
        progress=lambda what, at, total, unit: seen.append((what, at, total)),
    )
    assert [at for _, at, _ in seen] == sorted({at for _, at, _ in seen})
    total = sum(path.stat().st_size for path in done.files)
    assert seen[-1] == ("writing head.safetensors", total, total)
    assert seen[0][0] == "writing back.pth"


def test_reverting_imports_nothing_large(tmp_path: Path) -> None:
    folder = converted_folder(tmp_path, tiny(classes=3), max_shard_size="300KB")
    code = (
        "import sys\nfrom streamconv.cli.commands import app\n"
        f"words = ['revert', {str(folder)!r}, '-o', {str(tmp_path / 'x.pth')!r}]\n"
        f"app([*words, '--head', {str(tmp_path / 'y.pth')!r}], standalone_mode=False)\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'accelerate', 'huggingface_hub') if m in sys.modules])"
    )
    assert run_python(code).splitlines()[-1] == "[]"


LACKING = [
    {"has_layer_scale": False}, {"has_mask_token": False}, {"has_qkv_bias": False}, {"has_proj_bias": False},
    {"has_ffn_bias": False}, {"has_ffn_bias": False, "swiglu": True, "ffn": 344}, {"has_patch_bias": False},
    {"has_layer_scale": False, "has_proj_bias": False, "has_ffn_bias": False, "has_patch_bias": False},
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("lacking", LACKING)
@pytest.mark.parametrize("registers", [0, 4])
def test_constant_tensors_are_removed_again(
    tmp_path: Path, registers: int, lacking: dict[str, Any], suffix: str
) -> None:
    geometry = replace(tiny(registers=registers), **lacking)
    folder = converted_folder(tmp_path, geometry)
    streamconv.revert(folder, tmp_path / f"back{suffix}")
    state, _ = original_states(geometry)
    assert_same(state, tmp_path / f"back{suffix}")


def test_other_spellings_are_reverted_to_those_of_dinov2(tmp_path: Path) -> None:
    geometry = replace(tiny(), has_empty_registers=True, mask_key="masked_embed")
    streamconv.revert(converted_folder(tmp_path, geometry), tmp_path / "back.pth")
    state, _ = original_states(geometry)
    state["mask_token"] = state.pop("masked_embed")
    own = {key: state[key] for key in original_states(tiny())[0]}
    assert_same(own, tmp_path / "back.pth")


def test_constant_tensors_that_were_trained_are_kept(tmp_path: Path) -> None:
    geometry = replace(tiny(), has_layer_scale=False)
    folder = converted_folder(tmp_path, geometry)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["encoder.layer.1.layer_scale2.lambda1"][5] = 0.5
    safetensors.torch.save_file(tensors, path)
    streamconv.revert(folder, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["blocks.1.ls2.gamma"][5] == 0.5
    assert torch.equal(back["blocks.0.ls1.gamma"], torch.ones(128))


@pytest.mark.parametrize("chunks", [0, 1, 2, 3, 4, 11])
def test_block_chunks_are_restored(tmp_path: Path, chunks: int) -> None:
    """Eleven blocks are not a multiple of four: they are in six chunks of two."""
    geometry = tiny(layers=11)
    state, _ = original_states(geometry)
    size = 11 // chunks if chunks else 0
    named = chunked(state, size) if chunks else state
    torch.save({"teacher": {f"backbone.{key}": value for key, value in named.items()}}, tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "folder")
    streamconv.revert(tmp_path / "folder", tmp_path / "back.pth")
    assert_same(named, tmp_path / "back.pth")
    flat = run("revert", "folder", "-o", "flat.pth", "--block-chunks", "0", cwd=tmp_path)
    assert flat.returncode == 0, flat.stderr
    assert_same(state, tmp_path / "flat.pth")
    streamconv.revert(tmp_path / "folder", tmp_path / "two.pth", block_chunks=2)
    assert_same(chunked(state, 5), tmp_path / "two.pth")


def test_impossible_number_of_block_chunks_is_refused(tmp_path: Path) -> None:
    folder = converted_folder(tmp_path, tiny())
    for chunks in (-1, 4):
        with pytest.raises(UsageError, match=rf"3 blocks cannot be in {chunks} chunks"):
            streamconv.revert(folder, tmp_path / "back.pth", block_chunks=chunks)
    assert not (tmp_path / "back.pth").exists()


def test_published_model_without_a_manifest_is_reverted_with_its_block_chunks(tmp_path: Path) -> None:
    _, model = find_model("webssl_dino300m_full2b_224")
    save_zeros(tmp_path / "x.pth", model.dimensions, block_chunks=model.block_chunks)
    api.convert(tmp_path / "x.pth", tmp_path / "folder", dtype="bfloat16")
    (tmp_path / "folder" / "streamconv.json").unlink()
    done = streamconv.revert(tmp_path / "folder", tmp_path / "back.pth")
    assert done.shaped_like == "webssl_dino300m_full2b_224"
    with streamconv.open_checkpoint(tmp_path / "x.pth") as source, streamconv.open_checkpoint(done.files[0]) as back:
        assert list(back) == list(source)
        assert "blocks.3.23.ls2.gamma" in back


@pytest.mark.parametrize(
    "changes",
    [{"filled": {"norm.bias": 1.0}}, {"filled": {"layernorm.bias": 1e300}},
     {"filled": {"layernorm.bias": 1.0, "encoder.layer.0.norm1.bias": 1.0}}],
)  # fmt: skip
def test_altered_manifest_does_not_change_the_reverted_bytes(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = converted_folder(tmp_path, tiny())
    path = folder / "streamconv.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    streamconv.revert(folder, tmp_path / "back.pth")
    assert_same(original_states(tiny())[0], tmp_path / "back.pth")


@pytest.mark.parametrize(
    ("field", "value"),
    [("filled", ["x"]), ("filled", {"layernorm.bias": "1"}), ("block_chunks", "4"), ("block_chunks", None)],
)
def test_damaged_manifest_is_refused(tmp_path: Path, field: str, value: object) -> None:
    folder = converted_folder(tmp_path, tiny())
    path = folder / "streamconv.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), field: value}))
    with pytest.raises(OutputError, match=rf"streamconv\.json is damaged: its field {field}"):
        streamconv.revert(folder, tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_any_number_of_attention_heads_can_be_reverted(tmp_path: Path) -> None:
    geometry = replace(tiny(hidden=96), heads=3)  # 96 is no multiple of 64
    folder = converted_folder(tmp_path, geometry, num_heads=3)
    streamconv.revert(folder, tmp_path / "back.pth")
    assert_same(original_states(geometry)[0], tmp_path / "back.pth")


@pytest.mark.parametrize(
    "changed", [{"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}, {"model_type": "vit"}, {"num_hidden_layers": 2},
                {"patch_size": 16}, {"num_attention_heads": "x"}, {"image_size": 224}],
)  # fmt: skip
def test_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    torch.save(original_states(tiny())[0], tmp_path / "x.pth")
    folder = api.convert(tmp_path / "x.pth", tmp_path / "folder").output
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(MappingError) as caught:
        streamconv.revert(folder, tmp_path / "back.pth")
    ((key, value),) = changed.items()
    whose = (
        "the tensors show"
        if key in ("model_type", "num_hidden_layers", "patch_size", "image_size")
        else ("dinov2 models have")
    )
    message = f"its config.json sets {key} to {value!r}, but {whose}"
    assert any(message in problem for problem in caught.value.problems)
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize("data", [b"{", b"[]", None])
def test_config_that_cannot_be_read_is_refused(tmp_path: Path, data: bytes | None) -> None:
    folder = converted_folder(tmp_path, tiny())
    if data is None:
        os.mkfifo(folder / "config.json")
    else:
        (folder / "config.json").write_bytes(data)
    with pytest.raises(SourceError, match=r"config\.json"):
        streamconv.revert(folder, tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_long_value_in_a_config_is_shortened_in_the_message(tmp_path: Path) -> None:
    torch.save(original_states(tiny())[0], tmp_path / "x.pth")
    folder = api.convert(tmp_path / "x.pth", tmp_path / "folder").output
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu " * 1000}))
    with pytest.raises(MappingError, match=r"its config.json sets hidden_act to 'gelu gelu .*…, but") as caught:
        streamconv.revert(folder, tmp_path / "back.pth")
    assert len(str(caught.value)) < 400
