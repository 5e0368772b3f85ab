"""Conversions into another precision, from end to end; the casts themselves are test_cast.py's."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import CorruptError, MappingError, OutputError, UsageError
from streamconv.output.journal import Journal
from tests.conftest import make_states, run_python, seeds_mapping, tiny
from tests.engine.test_cli import run
from tests.engine.test_convert import contents, flip
from tests.engine.test_resume import ROOT, Interrupted, interrupt_after, many_marks

__all__ = ["many_marks"]  # the fixture

Save = Callable[..., tuple[Path, Path | None]]
TORCH = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PAIRS = [(stored, dtype) for stored in TORCH for dtype in ("float32", "float16", "bfloat16") if stored != dtype]


def state_of(stored: str, factor: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: (value * factor).to(TORCH[stored]) for name, value in make_states(tiny())[0].items()}


@pytest.mark.parametrize(("stored", "dtype"), PAIRS)
def test_one_file_is_what_save_file_makes_of_the_cast_mapping(tmp_path: Path, stored: str, dtype: str) -> None:
    state = state_of(stored)
    torch.save(state, tmp_path / "x.pth")
    done = streamconv.convert(tmp_path / "x.pth", tmp_path / "ours", dtype=dtype)
    theirs = {name: value.to(TORCH[dtype]) for name, value in seeds_mapping(state).items()}
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert json.loads((tmp_path / "ours" / "config.json").read_bytes())["dtype"] == dtype
    manifest = json.loads((tmp_path / "ours" / "streamconv.json").read_bytes())
    assert manifest["cast"] == done.as_dict()["cast"] == done.plan.cast == {"from": stored, "to": dtype}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_are_cut_by_their_cast_sizes(tmp_path: Path, save: Save, dtype: str) -> None:
    """As if the source had been cast before it was converted: files, index and all."""
    source, _ = save(tiny(swiglu=True))
    torch.save({name: value.to(TORCH[dtype]) for name, value in torch.load(source).items()}, tmp_path / "cast.pth")
    done = streamconv.convert(source, tmp_path / "ours", dtype=dtype, max_shard_size="150KB")
    streamconv.convert(tmp_path / "cast.pth", tmp_path / "theirs", max_shard_size="150KB")
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert len(done.plan.shards) > 3
    del ours["streamconv.json"], theirs["streamconv.json"]
    assert ours == theirs


def test_odd_layouts_of_the_source_are_cast_to_the_same_bytes(tmp_path: Path) -> None:
    plain, _ = make_states(tiny())
    odd = dict(plain)
    odd["blocks.0.attn.qkv.weight"] = plain["blocks.0.attn.qkv.weight"].t().contiguous().t()
    both = torch.stack([plain["blocks.0.ls1.gamma"], plain["blocks.0.ls2.gamma"]])
    odd["blocks.0.ls1.gamma"], odd["blocks.0.ls2.gamma"] = both[0], both[1]
    for name, state in (("plain", plain), ("odd", odd)):
        torch.save(state, tmp_path / f"{name}.pth")
        streamconv.convert(tmp_path / f"{name}.pth", tmp_path / name, dtype="bfloat16")
    file = "model.safetensors"
    assert (tmp_path / "odd" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_the_dtype_that_is_stored_is_no_cast(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert streamconv.convert(source, tmp_path / "out", dtype="float32").was_finished
    with pytest.raises(
        OutputError, match=r"its plan \(its names, its selection, its shard size, its dtype\) is another"
    ):
        streamconv.convert(source, tmp_path / "out", dtype="float16")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("dtype", ["float64", "int8", ""])
def test_what_is_no_dtype_to_cast_to_is_refused(tmp_path: Path, save: Save, dtype: str) -> None:
    source, _ = save(tiny())
    with pytest.raises(UsageError, match="Choose one of float32, float16, bfloat16"):
        streamconv.convert(source, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("shard_size", ["5GB", "150KB"])
def test_overflow_is_counted_also_over_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str
) -> None:
    state = state_of("float32", factor=1e6)
    state["norm.bias"][3] = torch.inf
    torch.save(state, tmp_path / "x.pth")
    lost = sum(int((value.half().isinf() & value.isfinite()).sum()) for value in state.values())
    options = {"dtype": "float16", "max_shard_size": shard_size}
    whole = streamconv.convert(tmp_path / "x.pth", tmp_path / "whole", **options)  # type: ignore[arg-type]
    assert whole.overflow_count == whole.as_dict()["overflow_count"] == lost > 1000
    interrupt_after(monkeypatch, tmp_path / "x.pth", tmp_path / "out", 0.5, **options)
    done = streamconv.convert(tmp_path / "x.pth", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert done.resumed_bytes > 0
    assert done.overflow_count == lost
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    next((tmp_path / "out").glob("*.safetensors")).unlink()
    for was_finished in (False, True):
        again = streamconv.convert(tmp_path / "x.pth", tmp_path / "out", **options)  # type: ignore[arg-type]
        assert (again.was_finished, again.overflow_count) == (was_finished, lost)
    assert streamconv.convert(tmp_path / "x.pth", tmp_path / "wide", dtype="bfloat16").overflow_count == 0


@pytest.mark.parametrize("tensor", ["mask_token", "blocks.1.attn.qkv.weight", "norm.bias"])
def test_a_flipped_bit_of_the_source_is_found_and_nothing_is_left(tmp_path: Path, save: Save, tensor: str) -> None:
    source, _ = save(tiny())
    flip(source, tensor, 100)
    with pytest.raises(CorruptError, match=r"CRC-32\. Fetch the file again"):
        streamconv.convert(source, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds a file's name in /proc")
@pytest.mark.parametrize(("how", "shard_size"), [("kill", "5GB"), ("power", "30KB"), ("power-names", "5GB")])
def test_a_kill_or_a_power_cut_at_any_step_costs_little(tmp_path: Path, how: str, shard_size: str) -> None:
    state = make_states(tiny(layers=2, hidden=64))[0]
    torch.save(state, tmp_path / "source.pth")
    words = [sys.executable, "-m", "tests.crash", tmp_path / "source.pth", tmp_path, how, shard_size, "25", "bfloat16"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [], done.stderr
    assert found["kills"] >= 25
    assert found["resumed_bytes"] > 15
    # A record that a mark cuts is read once more, of either kill.
    largest = max(value.nbytes for value in state.values())
    assert 0 < found["repeated"] <= found["max_repeated"] + 2 * largest


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("damage", ["a bit", "its end", "all"])
def test_what_was_written_is_not_believed(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "whole", dtype="bfloat16")
    interrupt_after(monkeypatch, source, tmp_path / "out", 0.6, dtype="bfloat16")
    (temporary,) = (tmp_path / "out").glob(".*-incomplete")
    data = bytearray(temporary.read_bytes())
    data[len(data) // 3] ^= 1
    temporary.write_bytes(
        bytes(len(data)) if damage == "all" else data[: len(data) // (4 if damage == "its end" else 1)]
    )
    assert streamconv.convert(source, tmp_path / "out", dtype="bfloat16").resumed_bytes == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_a_record_that_was_damaged_when_a_mark_cut_it_is_not_gone_on_from(
    tmp_path: Path, save: Save, shard_size: str
) -> None:
    """Interrupted between the damaged bytes and their record's end, where its CRC-32 would have told.

    The file fetched again has the same CRC-32s, so it is the same source.
    """
    source, _ = save(tiny())
    options = {"dtype": "bfloat16", "max_shard_size": shard_size}
    streamconv.convert(source, tmp_path / "whole", **options)  # type: ignore[arg-type]
    good = source.read_bytes()
    with streamconv.open_checkpoint(source) as checkpoint:
        record = checkpoint["blocks.1.mlp.fc1.weight"].record.range
    bad = bytearray(good)
    bad[record.start] ^= 1 << 7
    bad[record.start + 3] ^= 1  # one that a cast keeps
    cut = 0
    for share in (step / 30 for step in range(30)):
        source.write_bytes(bad)

        def progress(what: str, done: int, total: int, unit: str, share: float = share) -> None:
            if unit == "bytes" and done > share * total:
                raise Interrupted

        try:
            streamconv.convert(source, tmp_path / "out", progress=progress, **options)  # type: ignore[arg-type]
        except Interrupted:
            marks = Journal.read(tmp_path / "out").marks.values()
            cut += any(mark.unproven for mark in marks)
        except CorruptError:
            break
        source.write_bytes(good)
        streamconv.convert(source, tmp_path / "out", **options)  # type: ignore[arg-type]
        assert contents(tmp_path / "out") == contents(tmp_path / "whole"), share
        shutil.rmtree(tmp_path / "out")
    assert cut > 3
    if shard_size == "5GB":
        assert share > 0.3  # it came as far as the damage


def test_the_command_line_casts_and_tells(tmp_path: Path) -> None:
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
    assert "cast from float32 to bfloat16" in run("plan", "x.pth", "--dtype", "bfloat16", cwd=tmp_path).stdout
    torch.save(state_of("float32"), tmp_path / "x.pth")
    whole = run("run", "x.pth", "-o", "all", "--dtype", "bfloat16", "--device", "cpu", cwd=tmp_path)
    assert whole.stdout.splitlines()[-1] == "Looks ok!", whole.stderr
    wrong = run("convert", "x.pth", "-o", "other", "--dtype", "int8", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "Choose one of float32, float16, bfloat16" in wrong.stderr


PEAK = "\nprint(*(l.split()[1] for l in open('/proc/self/status') if l[:5] == 'VmHWM'))"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "float16"), ("bfloat16", "float32")])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, stored: str, dtype: str) -> None:
    peaks = []
    for name, geometry in (("small", tiny()), ("large", tiny(layers=24, hidden=512))):
        state = {key: value.to(TORCH[stored]) for key, value in make_states(geometry)[0].items()}
        torch.save(state, tmp_path / f"{name}.pth")
        words = f"{str(tmp_path / name)!r} + '.pth', {str(tmp_path / name)!r}, dtype={dtype!r}"
        peaks.append(int(run_python(f"import streamconv; streamconv.convert({words})" + PEAK)))
    assert peaks[1] < 64 * 1024  # numpy is 13 MB of it
    assert peaks[1] - peaks[0] < 8 * 1024


def test_a_cast_imports_numpy_and_nothing_larger(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    code = (
        f"import sys, streamconv; streamconv.convert({str(source)!r}, {str(tmp_path / 'out')!r}, dtype='float16')\n"
        "large = ('torch', 'numpy', 'ml_dtypes', 'transformers', 'accelerate', 'safetensors')\n"
        "print([m for m in large if m in sys.modules])"
    )
    assert run_python(code) == "['numpy']\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("classes", [None, 5])
def test_a_right_cast_passes_every_rung_exactly(tmp_path: Path, save: Save, dtype: str, classes: int | None) -> None:
    source, head = save(tiny(classes=classes))
    streamconv.convert(source, tmp_path / "out", head=head, dtype=dtype)
    found = streamconv.verify(tmp_path / "out", source, head=head, device="cpu")
    assert found.passed
    assert [check.passed for check in found.checks] == [True] * 4
    assert f"equals its source's, cast from float32 to {dtype};" in found.checks[0].proves
    assert found.checks[2].numbers["largest"] <= found.checks[2].numbers["tolerance"] < 1e-12
    assert streamconv.verify(tmp_path / "out").passed


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float16", "bfloat16"), ("bfloat16", "float32"), ("float64", "float32")]
)
def test_casts_from_other_precisions_pass_every_rung(tmp_path: Path, stored: str, dtype: str) -> None:
    torch.save(state_of(stored), tmp_path / "x.pth")
    streamconv.convert(tmp_path / "x.pth", tmp_path / "out", dtype=dtype)
    found = streamconv.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 4, found


@pytest.mark.parametrize("tensor", ["embeddings.mask_token", "encoder.layer.1.mlp.fc2.weight"])
def test_a_flipped_bit_of_a_cast_output_is_found(tmp_path: Path, save: Save, tensor: str) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "out", dtype="bfloat16")
    flip(tmp_path / "out" / "model.safetensors", tensor, 100)
    found = streamconv.verify(tmp_path / "out", source, device="cpu", parity=False)
    assert found.checks[0].passed is False
    assert f"{tensor} differs from its source, cast to BF16, from element 50 on" in found.checks[0].problems
    if "weight" in tensor:
        parity = streamconv.verify(tmp_path / "out", source, device="cpu").checks[2]
        assert parity.passed is False
        assert "the first difference is in layer 1" in parity.problems[0]


def test_another_cast_than_config_says_is_found(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "out", dtype="bfloat16")
    path = tmp_path / "out" / "config.json"
    good = json.loads(path.read_bytes())
    for dtype in ("float16", "float32", "float64", ["bfloat16"], None):
        path.write_text(json.dumps({**good, "dtype": dtype}))
        bytes_rung = streamconv.verify(tmp_path / "out", source, device="cpu", parity=False).checks[0]
        assert bytes_rung.passed is False, dtype


def mixed_state() -> dict[str, torch.Tensor]:
    state = state_of("float16")
    return state | {name: value.float() for name, value in state.items() if "norm" in name or "qkv" in name}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_several_dtypes_become_one(tmp_path: Path, dtype: str) -> None:
    state = mixed_state()
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"mixed dtypes: F16, F32; a model has one \(--dtype\)"):
        streamconv.plan(tmp_path / "x.pth")
    done = streamconv.convert(tmp_path / "x.pth", tmp_path / "out", dtype=dtype)
    stored = {"float32": "float16", "float16": "float32", "bfloat16": "float16 and float32"}[dtype]
    assert done.plan.cast == {"from": stored, "to": dtype}
    theirs = {name: value.to(TORCH[dtype]) for name, value in seeds_mapping(state).items()}
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    found = streamconv.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 4, found.checks


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_several_dtypes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """What is cast and what is not stand side by side in one file."""
    torch.save(mixed_state(), tmp_path / "x.pth")
    streamconv.convert(tmp_path / "x.pth", tmp_path / "whole", dtype="float16")
    interrupt_after(monkeypatch, tmp_path / "x.pth", tmp_path / "out", share, dtype="float16")
    assert streamconv.convert(tmp_path / "x.pth", tmp_path / "out", dtype="float16").resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
