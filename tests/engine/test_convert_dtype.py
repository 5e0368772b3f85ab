"""Conversions to another dtype; the casts themselves are tested in test_casts.py."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from streamconv import CorruptError, MappingError, OutputError, UsageError
from tests import api
from tests.checkpoints import TORCH_DTYPES, make_states, mixed_state, original_mapping, state_of
from tests.support import Save, contents, flip, interrupt_after, run, run_python, tiny

PAIRS = [(stored, dtype) for stored in TORCH_DTYPES for dtype in ("float32", "float16", "bfloat16") if stored != dtype]


@pytest.mark.parametrize(("stored", "dtype"), PAIRS)
def test_single_file_equals_save_file_of_the_cast_mapping(tmp_path: Path, stored: str, dtype: str) -> None:
    state = state_of(stored)
    torch.save(state, tmp_path / "x.pth")
    done = api.convert(tmp_path / "x.pth", tmp_path / "ours", dtype=dtype)
    theirs = {name: value.to(TORCH_DTYPES[dtype]) for name, value in original_mapping(state).items()}
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert json.loads((tmp_path / "ours" / "config.json").read_bytes())["dtype"] == dtype
    manifest = json.loads((tmp_path / "ours" / "streamconv.json").read_bytes())
    assert manifest["cast"] == done.as_dict()["cast"] == done.plan.cast == {"from": stored, "to": dtype}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_are_cut_by_their_size_after_the_cast(tmp_path: Path, save: Save, dtype: str) -> None:
    """All files and the index are those of a source that was cast before the conversion."""
    source, _ = save(tiny(swiglu=True))
    torch.save(
        {name: value.to(TORCH_DTYPES[dtype]) for name, value in torch.load(source).items()}, tmp_path / "cast.pth"
    )
    done = api.convert(source, tmp_path / "ours", dtype=dtype, max_shard_size="150KB")
    api.convert(tmp_path / "cast.pth", tmp_path / "theirs", max_shard_size="150KB")
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert len(done.plan.shards) > 3
    del ours["streamconv.json"], theirs["streamconv.json"]
    assert ours == theirs


def test_memory_layout_of_the_source_does_not_change_the_cast_output(tmp_path: Path) -> None:
    plain, _ = make_states(tiny())
    odd = dict(plain)
    odd["blocks.0.attn.qkv.weight"] = plain["blocks.0.attn.qkv.weight"].t().contiguous().t()
    both = torch.stack([plain["blocks.0.ls1.gamma"], plain["blocks.0.ls2.gamma"]])
    odd["blocks.0.ls1.gamma"], odd["blocks.0.ls2.gamma"] = both[0], both[1]
    for name, state in (("plain", plain), ("odd", odd)):
        torch.save(state, tmp_path / f"{name}.pth")
        api.convert(tmp_path / f"{name}.pth", tmp_path / name, dtype="bfloat16")
    file = "model.safetensors"
    assert (tmp_path / "odd" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_choosing_the_stored_dtype_is_not_a_cast(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert api.convert(source, tmp_path / "out", dtype="float32").was_finished
    with pytest.raises(OutputError, match=r"its plan \(its names, its selection, its shard size, its dtype\) differs"):
        api.convert(source, tmp_path / "out", dtype="float16")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("dtype", ["float64", "int8", ""])
def test_unsupported_target_dtype_is_refused(tmp_path: Path, save: Save, dtype: str) -> None:
    source, _ = save(tiny())
    with pytest.raises(UsageError, match="Choose float32, float16 or bfloat16"):
        api.convert(source, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("shard_size", ["5GB", "150KB"])
def test_overflow_count_survives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str
) -> None:
    state = state_of("float32", factor=1e6)
    state["norm.bias"][3] = torch.inf
    torch.save(state, tmp_path / "x.pth")
    lost = sum(int((value.half().isinf() & value.isfinite()).sum()) for value in state.values())
    options = {"dtype": "float16", "max_shard_size": shard_size}
    whole = api.convert(tmp_path / "x.pth", tmp_path / "whole", **options)
    assert whole.overflow_count == whole.as_dict()["overflow_count"] == lost > 1000
    interrupt_after(tmp_path / "x.pth", tmp_path / "out", 0.5, **options)
    done = api.convert(tmp_path / "x.pth", tmp_path / "out", **options)
    assert done.resumed_bytes > 0
    assert done.overflow_count == lost
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    next((tmp_path / "out").glob("*.safetensors")).unlink()
    for was_finished in (False, True):
        again = api.convert(tmp_path / "x.pth", tmp_path / "out", **options)
        assert (again.was_finished, again.overflow_count) == (was_finished, lost)
    assert api.convert(tmp_path / "x.pth", tmp_path / "wide", dtype="bfloat16").overflow_count == 0


@pytest.mark.parametrize("tensor", ["mask_token", "blocks.1.attn.qkv.weight", "norm.bias"])
def test_flipped_bit_in_a_cast_source_is_found_and_no_output_is_left(tmp_path: Path, save: Save, tensor: str) -> None:
    source, _ = save(tiny())
    flip(source, tensor, 100)
    with pytest.raises(CorruptError, match=r"CRC-32\. Fetch the file again"):
        api.convert(source, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("damage", ["a bit", "its end", "all"])
def test_damaged_partial_cast_output_starts_over(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole", dtype="bfloat16")
    interrupt_after(source, tmp_path / "out", 0.6, dtype="bfloat16")
    (temporary,) = (tmp_path / "out").glob(".*-incomplete")
    data = bytearray(temporary.read_bytes())
    data[len(data) // 3] ^= 1
    temporary.write_bytes(
        bytes(len(data)) if damage == "all" else data[: len(data) // (4 if damage == "its end" else 1)]
    )
    assert api.convert(source, tmp_path / "out", dtype="bfloat16").resumed_bytes == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_command_line_casts_and_reports_overflow(tmp_path: Path) -> None:
    torch.save(state_of("float32", factor=1e6), tmp_path / "x.pth")
    done = run("convert", "x.pth", "-o", "out", "--dtype", "float16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cast from float32 to float16" in done.stdout
    assert re.search(r"[1-9][0-9,]+ finite values are outside the range of float16 and are now infinite", done.stdout)
    again = run("convert", "x.pth", "-o", "out", "--dtype", "float16", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["cast"] == {"from": "float32", "to": "float16"}
    assert f"{json.loads(again.stdout)['overflow_count']:,} finite values" in done.stdout
    planned = json.loads(run("plan", "x.pth", "--dtype", "bfloat16", "--json", cwd=tmp_path).stdout)
    assert (planned["config"]["dtype"], planned["cast"]["to"]) == ("bfloat16", "bfloat16")
    assert "in bfloat16, cast from float32" in run("plan", "x.pth", "--dtype", "bfloat16", cwd=tmp_path).stdout
    wrong = run("convert", "x.pth", "-o", "other", "--dtype", "int8", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "Cannot cast to 'int8'. Choose float32, float16 or bfloat16." in wrong.stderr


@pytest.mark.parametrize(("dtype", "imported"), [("float16", ["numpy"]), ("bfloat16", ["numpy", "ml_dtypes"])])
def test_casting_imports_only_what_it_needs(tmp_path: Path, save: Save, dtype: str, imported: list[str]) -> None:
    source, _ = save(tiny())
    code = (
        f"import sys, streamconv; options = streamconv.ConversionOptions(dtype={dtype!r})\n"
        f"streamconv.convert({str(source)!r}, {str(tmp_path / 'out')!r}, options)\n"
        "large = ('torch', 'numpy', 'ml_dtypes', 'transformers', 'accelerate', 'safetensors')\n"
        "print([m for m in large if m in sys.modules])"
    )
    assert run_python(code) == f"{imported}\n"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mixed_dtypes_are_cast_to_one(tmp_path: Path, dtype: str) -> None:
    state = mixed_state()
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"mixed dtypes: F16 .* and F32 .*; a model has one: choose it with --dtype"):
        api.plan(tmp_path / "x.pth")
    done = api.convert(tmp_path / "x.pth", tmp_path / "out", dtype=dtype)
    stored = {"float32": "float16", "float16": "float32", "bfloat16": "float16 and float32"}[dtype]
    assert done.plan.cast == {"from": stored, "to": dtype}
    theirs = {name: value.to(TORCH_DTYPES[dtype]) for name, value in original_mapping(state).items()}
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_conversion_of_mixed_dtypes_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Tensors that are cast and tensors that are not are in the same file."""
    torch.save(mixed_state(), tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "whole", dtype="float16")
    interrupt_after(tmp_path / "x.pth", tmp_path / "out", share, dtype="float16")
    assert api.convert(tmp_path / "x.pth", tmp_path / "out", dtype="float16").resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
