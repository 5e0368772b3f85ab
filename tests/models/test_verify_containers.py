"""Verification of checkpoints in other containers: archives of numpy, and folders of .bin files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests import api
from tests.checkpoints import make_states
from tests.support import tiny


@pytest.mark.parametrize("order", ["C", "F"])
def test_archive_of_numpy_is_verified(tmp_path: Path, order: str) -> None:
    arrays = {name: value.numpy() for name, value in make_states(tiny())[0].items()}

    def save(**more: Any) -> None:
        found = {name: np.asarray(value, order=order) for name, value in {**arrays, **more}.items()}  # type: ignore
        np.savez(tmp_path / "x.npz", args=np.array({"not": "read"}), **found)

    save()
    api.convert(tmp_path / "x.npz", tmp_path / "out")
    found = api.verify(tmp_path / "out", tmp_path / "x.npz", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").numbers["largest"] == 0.0
    assert "reader" not in found.check("parity").not_checked
    save(**{"blocks.1.norm1.bias": arrays["blocks.1.norm1.bias"] + 1})
    assert api.verify(tmp_path / "out", tmp_path / "x.npz", device="cpu").check("parity").passed is False


def test_archive_of_numpy_with_a_head_is_verified(tmp_path: Path) -> None:
    backbone, head = make_states(tiny(classes=3))
    for name, state in (("x", backbone), ("head", head)):
        np.savez(tmp_path / f"{name}.npz", **{key: value.numpy() for key, value in state.items()})
    api.convert(tmp_path / "x.npz", tmp_path / "out", head=tmp_path / "head.npz")
    found = api.verify(tmp_path / "out", tmp_path / "x.npz", head=tmp_path / "head.npz", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks


@pytest.mark.parametrize("layout", ["bin", "sharded bin"])
def test_folder_of_bin_files_is_verified(tmp_path: Path, layout: str) -> None:
    torch.save(make_states(tiny())[0], tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "first")
    state = safetensors.torch.load_file(tmp_path / "first" / "model.safetensors")
    (tmp_path / "bin").mkdir()
    if layout == "bin":
        torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    else:
        files = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
        for file in set(files.values()):
            torch.save({name: state[name] for name in state if files[name] == file}, tmp_path / "bin" / file)
        (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    api.convert(tmp_path / "bin", tmp_path / "out")
    found = api.verify(tmp_path / "out", tmp_path / "bin", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
