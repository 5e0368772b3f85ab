"""Back again: what was converted comes back byte for byte, and what transformers saved is what the authors load."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import streamconv
from streamconv import ChangedError, CorruptError, MappingError, OutputError, SourceMissingError, UsageError
from streamconv.families.dinov2 import Geometry
from streamconv.verification.originals import dinov2 as original
from tests.conftest import State, run_python, tiny
from tests.engine.test_cli import run
from tests.engine.test_convert import peak_kb
from tests.engine.test_faults import CALLS, Faults, small_disk
from tests.engine.test_selection import chunked

__all__ = ["small_disk"]  # a fixture
HEAD = "linear_head."


def original_states(geometry: Geometry, dtype: torch.dtype = torch.float32) -> tuple[State, State]:
    """Random backbone and head (empty without classes), in the order in which the original model's graph has them."""
    model = original.build(geometry).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    state = model.state_dict()
    backbone = {key: value for key, value in state.items() if not key.startswith(HEAD)}
    return backbone, {key.removeprefix(HEAD): value for key, value in state.items() if key.startswith(HEAD)}


def converted(tmp_path: Path, geometry: Geometry, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A folder that was converted from `original_states`, without its small files."""
    backbone, head = original_states(geometry, dtype)
    torch.save(backbone, tmp_path / "source.pth")
    torch.save(head, tmp_path / "source_head.pth")
    head_path = tmp_path / "source_head.pth" if head else None
    folder = streamconv.convert(tmp_path / "source.pth", tmp_path / "folder", head=head_path, **options).output
    for path in (tmp_path / "source.pth", tmp_path / "source_head.pth", *folder.glob("*config.json")):
        path.unlink()
    return folder


def assert_same(state: State, path: Path) -> None:
    """``path`` holds what torch.save or safetensors' save_file would write of ``state``."""
    if path.suffix == ".safetensors":
        assert path.read_bytes() == safetensors.torch.save(state, metadata={"format": "pt"})
        return
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(state)
        for key, value in loaded.items():
            assert (value.dtype, value.shape) == (state[key].dtype, state[key].shape), key
            assert torch.equal(value.view(torch.uint8), state[key].view(torch.uint8)), key


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("limit", ["5GB", "300KB"])
@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("swiglu", [False, True])
def test_what_was_converted_comes_back(
    tmp_path: Path, swiglu: bool, registers: int, classes: int | None, limit: str, suffix: str
) -> None:
    geometry = tiny(swiglu, classes, registers=registers, layers=11)
    folder = converted(tmp_path, geometry, max_shard_size=limit)
    assert (folder / "model.safetensors").exists() == (limit == "5GB")
    head_path = tmp_path / f"head{suffix}" if classes else None
    done = streamconv.revert(folder, tmp_path / f"back{suffix}", head=head_path)
    backbone, head = original_states(geometry)
    assert_same(backbone, tmp_path / f"back{suffix}")
    if head_path:
        assert_same(head, head_path)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", *(path.name for path in done.files)}
    assert done.weights == sum(value.nbytes for value in (*backbone.values(), *head.values()))
    assert done.model is None


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_come_back(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    folder = converted(tmp_path, tiny(), dtype)
    streamconv.revert(folder, tmp_path / f"back{suffix}")
    assert_same(original_states(tiny(), dtype)[0], tmp_path / f"back{suffix}")


def test_records_are_aligned_whatever_the_files_name(tmp_path: Path) -> None:
    folder = converted(tmp_path, tiny())
    streamconv.revert(folder, tmp_path / "modèle größer.pth")
    assert_same(original_states(tiny())[0], tmp_path / "modèle größer.pth")
    with streamconv.open_checkpoint(tmp_path / "modèle größer.pth") as checkpoint:
        assert all(tensor.record.range.start % 64 == 0 for tensor in checkpoint.values())
        assert all(tensor.record.crc32 is not None for tensor in checkpoint.values())


def test_a_published_model_is_told_by_its_name(tmp_path: Path) -> None:
    streamconv.synth("dinov2_vits14_reg", tmp_path / "source.pth")
    streamconv.convert(tmp_path / "source.pth", tmp_path / "folder")
    (tmp_path / "back").mkdir()
    done = run("revert", "folder", "-o", "back/source.pth", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "source.pth").stat().st_size
    assert json.loads(done.stdout)["model"] == "dinov2_vits14_reg"
    assert json.loads(done.stdout)["files"] == [{"file": "back/source.pth", "bytes": size}]
    assert (tmp_path / "back" / "source.pth").read_bytes() == (tmp_path / "source.pth").read_bytes()


@pytest.mark.parametrize("limit", ["5GB", "300KB"])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("classes", [None, 5])
def test_what_transformers_saved_is_loaded_strictly_and_computes_the_same(
    tmp_path: Path, classes: int | None, registers: int, swiglu: bool, limit: str
) -> None:
    geometry = tiny(swiglu, classes, registers=registers)
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14,
        use_swiglu_ffn=swiglu, num_labels=classes or 2, **({"num_register_tokens": registers} if registers else {}),
    )  # fmt: skip
    model = getattr(transformers, f"{kind}{'ForImageClassification' if classes else 'Model'}")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    model.save_pretrained(tmp_path / "folder", max_shard_size=limit)
    head_path = tmp_path / "head.pth" if classes else None
    streamconv.revert(tmp_path / "folder", tmp_path / "back.pth", head=head_path)

    state = torch.load(tmp_path / "back.pth", weights_only=True)
    if head_path:
        state |= {HEAD + key: value for key, value in torch.load(head_path, weights_only=True).items()}
    graph = original.build(geometry).eval()
    assert list(state) == list(graph.state_dict())
    graph.load_state_dict(state, strict=True)
    # In float32, transformers 5's two halves of a SwiGLU round otherwise than Meta's one layer.
    pixels = torch.randn(2, 3, 56, 56, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        states = dict(original.states(graph.double(), pixels))
        theirs = model.double()(pixels)
    if classes:
        compared = [(states["logits"], theirs.logits)]
    else:
        tokens = theirs.last_hidden_state
        compared = [(states["cls"], theirs.pooler_output), (states["patches"], tokens[:, 1 + registers :])]
    for ours, other in compared:
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-13)

    again = streamconv.convert(tmp_path / "back.pth", tmp_path / "again", head=head_path, max_shard_size=limit).output
    tensors = [
        {
            name: value
            for path in each.glob("*.safetensors")
            for name, value in safetensors.torch.load_file(path).items()
        }
        for each in (tmp_path / "folder", again)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    folder = converted(tmp_path, tiny())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["encoder.layer.1.attention.attention.key.weight"]
    state["encoder.layer.2.attention.attention.value.bias"] = torch.zeros(127)
    state["encoder.layer.0.norm1.bias"] = torch.zeros(128, dtype=torch.float16)
    state["pooler.weight"] = torch.zeros(1)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(MappingError, match=r"folder does not fit \(4 problems\)") as caught:
        streamconv.revert(folder, tmp_path / "back.pth")
    assert sorted(caught.value.problems) == [
        "misshaped: encoder.layer.2.attention.attention.value.bias is [127], not [128]",
        "missing: encoder.layer.1.attention.attention.key.weight [128, 128]",
        "mixed dtypes: F16, F32; a model has one",
        "unexpected: pooler.weight [1]",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_two_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = converted(tmp_path, tiny())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state |= {f"dinov2.{name}": value.clone() for name, value in state.items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(MappingError, match=r"unexpected: dinov2\.embeddings\.cls_token"):
        streamconv.revert(folder, tmp_path / "back.pth")


def test_what_cannot_be_reverted_is_refused_with_the_mend(tmp_path: Path) -> None:
    folder = converted(tmp_path, tiny())
    data = (folder / "model.safetensors").read_bytes()
    for name, contents in (("cut", data[:-1]), ("damaged", data[:100] + b"}" + data[101:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(contents)
    for name, state in (
        ("bert", {f"bert.encoder.layer.{i}.weight": torch.zeros(1) for i in range(9)}),
        ("original", original_states(tiny())[0]),
        ("whole", {k: v.to(torch.int32) for k, v in safetensors.torch.load_file(folder / "model.safetensors").items()}),
    ):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(state, tmp_path / name / "model.safetensors")
    (tmp_path / "classifier").mkdir()
    converted(tmp_path / "classifier", tiny(classes=3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.pth").write_bytes(b"mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for error, says, name, output, head in (
        (SourceMissingError, "none is no folder. Name the one", "none", "x.pth", None),
        (SourceMissingError, "is no folder. Name the one", "folder/model.safetensors", "x.pth", None),
        (SourceMissingError, "holds neither model.safetensors nor", "empty", "x.pth", None),
        (streamconv.TruncatedError, "Fetch it again", "cut", "x.pth", None),
        (CorruptError, "has no dtype, shape or data_offsets of", "damaged", "x.pth", None),
        (MappingError, r"\(dinov2\), but:\n  bert.encoder.layer.0.weight\n", "bert", "x.pth", None),
        (MappingError, r"\(dinov2\), but:\n", "original", "x.pth", None),
        (MappingError, "its tensors are I32, which is no model's dtype", "whole", "x.pth", None),
        (OutputError, "there.pth is there already. Choose another name, or delete it", "folder", "there.pth", None),
        (OutputError, "there.pth is there already", "classifier/folder", "x.pth", "there.pth"),
        (OutputError, "is there already", "folder", "folder/model.safetensors", None),
        (OutputError, "none is no folder. Make it first", "folder", "none/x.pth", None),
        (UsageError, "taken for one. Choose another folder", "folder", "folder/x.pth", None),
        (UsageError, "End its name in .pth, .pt, .bin, .safetensors", "folder", "x.onnx", None),
        (UsageError, "End its name in .pth", "folder", "x", None),
        (UsageError, "End its name in .pth", "classifier/folder", "x.pth", "head"),
        (UsageError, "is a classifier, .* --head FILE", "classifier/folder", "x.pth", None),
        (UsageError, "is no classifier, .* Leave --head out", "folder", "x.pth", "y.pth"),
        (UsageError, "Give --head another name", "classifier/folder", "x.pth", "./x.pth"),
    ):
        with pytest.raises(error, match=says):
            streamconv.revert(tmp_path / name, tmp_path / output, head=head and f"{tmp_path}/{head}")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, (name, output)


def test_mistakes_end_in_one_message_and_their_code(tmp_path: Path) -> None:
    converted(tmp_path, tiny())
    (tmp_path / "there.pth").touch()
    for code, says, words in (
        (2, "Missing option", ("folder",)),
        (2, "End its name in", ("folder", "-o", "")),
        (2, "Leave --head out", ("folder", "-o", "x.pth", "--head", "y.pth")),
        (3, "is no folder", ("none", "-o", "x.pth")),
        (4, "is there already", ("folder", "-o", "there.pth")),
    ):
        done = run("revert", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, ""), (words, done.stderr)
        assert says in done.stderr, words
        assert "Traceback" not in done.stderr, words
    done = run("revert", "folder", "-o", "x.pth", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "writing x.pth\n")
    assert "bytes of weights in x.pth\n  its bytes were believed" in done.stdout


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_interrupted_one_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    folder = converted(tmp_path, tiny(classes=900))
    code = (
        "import os, signal, sys, streamconv.cli.commands as cli\n"
        "def progress(self, what, done, total, unit):\n"
        "    if what.startswith('writing head') and done == total: os.kill(os.getpid(), signal.SIGTERM)\n"
        "cli.ProgressReport.__call__ = progress\n"
        f"sys.argv = ['streamconv', 'revert', {str(folder)!r}, '-o', 'x{suffix}', '--head', 'head{suffix}']\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "")
    assert done.stderr.startswith("Interrupted. To resume, run\n  streamconv revert ")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_each_call_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, number: int) -> None:
    folder = converted(tmp_path, tiny(classes=3))
    out = tmp_path / "out"
    out.mkdir()
    paths = (out / f"x{suffix}", out / f"head{suffix}")
    with monkeypatch.context() as patch:
        counting = Faults(patch, CALLS, number, at=-1)
        streamconv.revert(folder, paths[0], head=paths[1])
    whole = {path: path.read_bytes() for path in paths}
    assert counting.seen >= 12
    for at in range(1, counting.seen + 1):
        shutil.rmtree(out)
        out.mkdir()
        with monkeypatch.context() as patch:
            Faults(patch, CALLS, number, at)
            with pytest.raises(OutputError, match=os.strerror(number)):
                streamconv.revert(folder, paths[0], head=paths[1])
        # What has its name is whole; all was synced before, so that only the naming itself can fail between the two.
        assert all(whole[path] == path.read_bytes() for path in out.iterdir()), at


@pytest.mark.parametrize("at", [1, 2, None])  # on the way, at the end, both
def test_what_cannot_be_synced_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int | None) -> None:
    folder = converted(tmp_path, tiny(classes=3))
    monkeypatch.setattr(sys.modules["streamconv.jobs.revert"], "SYNC_BYTES", 2 << 20)
    Faults(monkeypatch, ("fdatasync",), errno.EIO, at)
    with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
        streamconv.revert(folder, tmp_path / "x.pth", head=tmp_path / "head.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("reserves", [True, False])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, reserves: bool, suffix: str
) -> None:
    folder = converted(tmp_path, tiny())
    filler, path = small_disk / "filler", small_disk / f"x{suffix}"
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate")

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if done > 0.4 * total and not filler.exists():
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 12)):
                    pass

    # The weights' room is reserved when it begins; what a .pth has behind them then finds none.
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
def test_a_folder_that_changes_meanwhile_is_refused(tmp_path: Path, suffix: str) -> None:
    folder = converted(tmp_path, tiny())

    def progress(what: str, done: int, total: int, unit: str) -> None:
        os.utime(folder / "model.safetensors", ns=(0, done))

    with pytest.raises(ChangedError, match="was changed while it was read"):
        streamconv.revert(folder, tmp_path / f"back{suffix}", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_two_at_once_are_one_too_many(tmp_path: Path) -> None:
    folder = converted(tmp_path, tiny())
    said: Iterator[Any] = iter([True])

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if next(said, False):
            with pytest.raises(OutputError, match="is being written by another process"):
                streamconv.revert(folder, tmp_path / "back.pth")

    streamconv.revert(folder, tmp_path / "back.pth", progress=progress)
    assert_same(original_states(tiny())[0], tmp_path / "back.pth")


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    folder = converted(tmp_path, tiny(classes=900), max_shard_size="300KB")
    seen: list[tuple[str, int, int]] = []
    done = streamconv.revert(
        folder,
        tmp_path / "back.pth",
        head=tmp_path / "head.safetensors",
        progress=lambda what, at, total, unit: seen.append((what, at, total)),
    )
    assert [at for _, at, _ in seen] == sorted({at for _, at, _ in seen})
    assert seen[-1] == ("writing head.safetensors", done.weights, done.weights)
    assert seen[0][0] == "writing back.pth"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for name, geometry in (("small", tiny()), ("large", tiny(layers=24, hidden=640))):  # 3 and 480 MB
        (tmp_path / name).mkdir()
        folder = converted(tmp_path / name, geometry)
        path = tmp_path / f"{name}{suffix}"
        peaks.append(peak_kb(f"import streamconv; streamconv.revert({str(folder)!r}, {str(path)!r})"))
        assert path.stat().st_size >= (folder / "model.safetensors").stat().st_size - 100_000
    assert peaks[1] < 32 * 1024
    assert peaks[1] - peaks[0] < 4 * 1024


def test_reverting_imports_nothing_large(tmp_path: Path) -> None:
    folder = converted(tmp_path, tiny(classes=3), max_shard_size="300KB")
    code = (
        "import sys\nfrom streamconv.cli import app\n"
        f"words = ['revert', {str(folder)!r}, '-o', {str(tmp_path / 'x.pth')!r}]\n"
        f"app([*words, '--head', {str(tmp_path / 'y.pth')!r}], standalone_mode=False)\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'accelerate', 'huggingface_hub') if m in sys.modules])"
    )
    assert run_python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("lacking", [{"has_layer_scale": False}, {"has_mask_token": False}, {"has_qkv_bias": False}])
@pytest.mark.parametrize("registers", [0, 4])
def test_what_was_filled_in_goes_again(tmp_path: Path, registers: int, lacking: dict[str, bool], suffix: str) -> None:
    geometry = replace(tiny(registers=registers), **lacking)  # type: ignore[arg-type]
    folder = converted(tmp_path, geometry)
    streamconv.revert(folder, tmp_path / f"back{suffix}")
    state, _ = original_states(geometry)
    assert_same(state, tmp_path / f"back{suffix}")


def test_what_was_filled_in_and_trained_on_stays(tmp_path: Path) -> None:
    geometry = replace(tiny(), has_layer_scale=False)
    folder = converted(tmp_path, geometry)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["encoder.layer.1.layer_scale2.lambda1"][5] = 0.5
    safetensors.torch.save_file(tensors, path)
    streamconv.revert(folder, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["blocks.1.ls2.gamma"][5] == 0.5
    assert torch.equal(back["blocks.0.ls1.gamma"], torch.ones(128))


@pytest.mark.parametrize("chunks", [0, 1, 2, 3, 4, 11])
def test_blocks_in_chunks_come_back_in_chunks(tmp_path: Path, chunks: int) -> None:
    """Eleven blocks are no multiple of four: these are in chunks of two, and so in six."""
    geometry = tiny(layers=11)
    state, _ = original_states(geometry)
    size = 11 // chunks if chunks else 0
    named = chunked(state, size) if chunks else state
    torch.save({"teacher": {f"backbone.{key}": value for key, value in named.items()}}, tmp_path / "x.pth")
    streamconv.convert(tmp_path / "x.pth", tmp_path / "folder")
    streamconv.revert(tmp_path / "folder", tmp_path / "back.pth")
    assert_same(named, tmp_path / "back.pth")
    flat = run("revert", "folder", "-o", "flat.pth", "--block-chunks", "0", cwd=tmp_path)
    assert flat.returncode == 0, flat.stderr
    assert_same(state, tmp_path / "flat.pth")
    streamconv.revert(tmp_path / "folder", tmp_path / "two.pth", block_chunks=2)
    assert_same(chunked(state, 5), tmp_path / "two.pth")


def test_wrong_numbers_of_chunks_are_refused(tmp_path: Path) -> None:
    folder = converted(tmp_path, tiny())
    for chunks in (-1, 4):
        with pytest.raises(UsageError, match=rf"3 blocks cannot be in {chunks} chunks"):
            streamconv.revert(folder, tmp_path / "back.pth", block_chunks=chunks)
    assert not (tmp_path / "back.pth").exists()


def test_a_folder_without_a_manifest_of_a_published_model_has_its_chunks(tmp_path: Path) -> None:
    streamconv.synth("webssl_dino300m_full2b_224", tmp_path / "x.pth")
    streamconv.convert(tmp_path / "x.pth", tmp_path / "folder", dtype="bfloat16")
    (tmp_path / "folder" / "streamconv.json").unlink()
    done = streamconv.revert(tmp_path / "folder", tmp_path / "back.pth")
    assert done.model is not None
    with streamconv.open_checkpoint(tmp_path / "x.pth") as source, streamconv.open_checkpoint(done.files[0]) as back:
        assert list(back) == list(source)
        assert "blocks.3.23.ls2.gamma" in back


@pytest.mark.parametrize(
    "said",
    [{"filled": {"norm.bias": 1.0}}, {"filled": ["x"]}, {"filled": {"layernorm.bias": "1"}},
     {"filled": {"layernorm.bias": 1.0, "encoder.layer.0.norm1.bias": 1.0}}, {"block_chunks": "4"},
     {"block_chunks": None}],
)  # fmt: skip
def test_a_manifest_that_someone_altered_changes_nothing(tmp_path: Path, said: dict[str, object]) -> None:
    folder = converted(tmp_path, tiny())
    path = folder / "streamconv.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **said}))
    streamconv.revert(folder, tmp_path / "back.pth")
    assert_same(original_states(tiny())[0], tmp_path / "back.pth")


def test_heads_of_any_number_come_back(tmp_path: Path) -> None:
    geometry = replace(tiny(hidden=96), heads=3)  # 96 is no multiple of 64
    folder = converted(tmp_path, geometry, num_heads=3)
    streamconv.revert(folder, tmp_path / "back.pth")
    assert_same(original_states(geometry)[0], tmp_path / "back.pth")


@pytest.mark.parametrize(
    "changed", [{"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}, {"model_type": "vit"}, {"num_hidden_layers": 2},
                {"patch_size": 16}, {"num_attention_heads": "x"}, {"image_size": 224}],
)  # fmt: skip
def test_a_configuration_that_says_something_else_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    torch.save(original_states(tiny())[0], tmp_path / "x.pth")
    folder = streamconv.convert(tmp_path / "x.pth", tmp_path / "folder").output
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(MappingError) as caught:
        streamconv.revert(folder, tmp_path / "back.pth")
    ((key, value),) = changed.items()
    assert any(f"its config.json says {key} {value!r}" in problem for problem in caught.value.problems)
    assert not (tmp_path / "back.pth").exists()
