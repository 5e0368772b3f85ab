"""Randomly changed files: streamconv reads the same as the format's own library, or refuses the file."""

import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import streamconv
from streamconv.formats import limits
from streamconv.tensors.info import BY_NUMPY_NAME
from tests.checkpoints import EVERY_KIND, described, read_or_refuse
from tests.fuzz import mutated
from tests.hostile import Refusal
from tests.support import rewrite

WIDE_KEY = "a" * 1_000_000 + "🙂"
WIDE_KEYS = b"\x80\x02](" + (b"X" + struct.pack("<I", 1_000_004) + WIDE_KEY.encode()) * 12  # after all tensors


@pytest.mark.parametrize("kind", ["pth", "old.pth", "safetensors"])
def test_largest_allowed_number_of_tensors_is_opened(tmp_path: Path, kind: str, refusal: Refusal) -> None:
    state = {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(2, 3, 1, 1) for i in range(limits.MAX_TENSORS)}
    if kind == "old.pth":
        torch.save(state, tmp_path / "x.old.pth", _use_new_zipfile_serialization=False)
    else:
        (torch.save if kind == "pth" else safetensors.torch.save_file)(state, tmp_path / f"x.{kind}")
    with streamconv.open_checkpoint(tmp_path / f"x.{kind}") as checkpoint:
        assert len(checkpoint) == 65_536
    if kind == "pth":
        with zipfile.ZipFile(tmp_path / "x.pth") as archive:
            data = archive.read("x/data.pkl")
        rewrite(tmp_path / "x.pth", {"data.pkl": data[:-1] + b"cos\nsystem\n."})
        # All of it had to be read, by a command, whose own code takes 5 MB.
        assert "os.system" in refusal(tmp_path / "x.pth", seconds=3, peak_bytes=97_000_000)
        wide = [b"X" + struct.pack("<I", 60_004) + b"%d" % (i % 10) * 60_000 + "🙂".encode() for i in range(190)]
        rewrite(tmp_path / "x.pth", {"data.pkl": b"\x80\x02](" + b"".join(wide) + b"e."})
        assert "bytes of objects" in refusal(tmp_path / "x.pth", peak_bytes=97_000_000)
    elif kind == "old.pth":
        whole = (tmp_path / "x.old.pth").read_bytes()
        (tmp_path / "x.old.pth").write_bytes(whole[: whole.rindex(b"\x80\x02]q\x00(X")] + WIDE_KEYS)
        assert "bytes of objects" in refusal(tmp_path / "x.old.pth", seconds=3)


def is_read_as_by(load: Callable[[Path], dict[str, torch.Tensor]], path: Path) -> bool:
    """Return True if both read the file, after asserting that they read the same; False if either refuses it."""
    ours = read_or_refuse(path)
    if ours is None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = load(path)
        except Exception:
            return False
    assert described(loaded) == ours
    return True


@pytest.mark.parametrize("has_attributes", [False, True])
def test_mutated_pth_is_read_like_torch_or_refused(tmp_path: Path, has_attributes: bool) -> None:
    chance = random.Random(0)
    state = {name: value.clone() for name, value in EVERY_KIND.items()}
    for value in state.values() if has_attributes else ():
        value.data_before = torch.zeros(1)  # type: ignore[attr-defined]  # five bytes from an attribute that sets values
    torch.save(state, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    whole = (tmp_path / "x.pth").read_bytes()
    both = 0
    for i in range(1200):
        if i % 4:
            with zipfile.ZipFile(tmp_path / "y.pth", "w") as archive:
                for name, data in records.items():
                    archive.writestr(name, mutated(data, chance) if name.endswith("data.pkl") else data)
        else:
            (tmp_path / "y.pth").write_bytes(mutated(whole, chance))
        both += is_read_as_by(partial(torch.load, weights_only=True), tmp_path / "y.pth")
    assert both > 20


def test_mutated_legacy_file_is_read_like_torch_or_refused(tmp_path: Path) -> None:
    chance = random.Random(0)
    old = {name: value for name, value in EVERY_KIND.items() if name != "fp8"}  # which torch cannot load from there
    torch.save(old, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pth").read_bytes()
    both = 0
    for _ in range(1200):
        (tmp_path / "y.pth").write_bytes(mutated(whole, chance))
        both += is_read_as_by(partial(torch.load, weights_only=True), tmp_path / "y.pth")
    assert both > 20


def test_mutated_safetensors_are_read_like_the_library_or_refused(tmp_path: Path) -> None:
    chance = random.Random(0)
    safetensors.torch.save_file({k: v.contiguous() for k, v in EVERY_KIND.items()}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    both = 0
    for i in range(1200):
        header = mutated(whole[8:start], chance) if i % 4 else whole[8:start]
        data = struct.pack("<Q", len(header)) + header + whole[start:]
        (tmp_path / "y.safetensors").write_bytes(data if i % 4 else mutated(data, chance))
        both += is_read_as_by(safetensors.torch.load_file, tmp_path / "y.safetensors")
    assert both > 20


def load_arrays(path: Path) -> dict[str, torch.Tensor]:
    """Return the arrays that numpy reads, except those that streamconv reports as unread."""
    with np.load(path) as archive, streamconv.open_checkpoint(path) as checkpoint:
        return {name: torch.from_numpy(archive[name]) for name in archive if name not in checkpoint.non_tensors}


def test_mutated_npz_is_read_like_numpy_or_refused(tmp_path: Path) -> None:
    chance = random.Random(0)
    arrays = {f"a{i}": np.arange(24).reshape(2, 3, 4).astype(dtype) for i, dtype in enumerate(BY_NUMPY_NAME)}
    np.savez(tmp_path / "x.npz", **arrays, f=np.asfortranarray(arrays["a3"]), scalar=np.float32(1), note=np.array("x"))
    whole = (tmp_path / "x.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    both = 0
    for i in range(1200):
        if i % 4:
            changed = chance.choice([*records])
            text, values = mutated(records[changed][10:74], chance), records[changed][128:]
            header = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
            with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
                for name, data in records.items():
                    archive.writestr(name, header + values if name == changed else data)
        else:
            (tmp_path / "y.npz").write_bytes(mutated(whole, chance))
        both += is_read_as_by(load_arrays, tmp_path / "y.npz")
    assert both > 20
