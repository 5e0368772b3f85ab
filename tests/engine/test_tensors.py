"""Lazily described tensors equal torch's own, in every layout that torch can save."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streamconv
from streamconv.tensors.computed import add, multiply
from streamconv.tensors.concatenation import reshape
from streamconv.tensors.evaluation import read_bytes
from tests.checkpoints import NAMES, SETTINGS, bytes_of, views


@SETTINGS
@given(state=st.dictionaries(NAMES, views(), max_size=5))
def test_every_view_is_read_like_torch_loads_it(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "views.pth"
    torch.save(state, path)
    loaded = torch.load(path, weights_only=True)
    with streamconv.open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == list(loaded)
        for name, tensor in loaded.items():
            assert checkpoint[name].info.shape == tuple(tensor.shape)
            assert read_bytes(checkpoint[name]) == bytes_of(tensor), name


@SETTINGS
@given(tensor=views().filter(lambda t: t.ndim > 0), data=st.data())
def test_rows_are_a_slice_of_dimension_0(tmp_path: Path, tensor: torch.Tensor, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, tensor.shape[0]))
    stop = data.draw(st.integers(start, tensor.shape[0]))
    torch.save({"x": tensor}, tmp_path / "x.pth")
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert read_bytes(checkpoint["x"].narrow(0, start, stop - start)) == bytes_of(tensor[start:stop])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_products_and_sums_are_those_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    one, other = (torch.randn(3, 50, 40).mul(100).to(dtype) for _ in range(2))
    torch.save({"one": one, "other": other}, tmp_path / "x.pth")
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        pair = (checkpoint["one"], checkpoint["other"])
        for ours, theirs in ((add(*pair), one + other), (multiply(*pair), one * other)):
            assert read_bytes(ours) == bytes_of(theirs)
            view = reshape(ours.permute((2, 0, 1)).narrow(0, 3, 20), (60, 50))
            assert read_bytes(view) == bytes_of(theirs.permute(2, 0, 1)[3:23].reshape(60, 50))
        assert add(*pair).fingerprint != multiply(*pair).fingerprint
        with pytest.raises(ValueError, match=r"add: \w+ \[3, 50, 40\] and \w+ \[2, 50, 40\] differ"):
            add(pair[0], pair[1].narrow(0, 0, 2))


def test_channels_last_and_shared_storages_are_read_correctly(tmp_path: Path) -> None:
    weight = torch.randn(8, 3, 14, 14).to(memory_format=torch.channels_last)
    shared = torch.randn(6, 4)
    state = {
        "weight": weight,
        "all": shared,
        "half": shared[3:],
        "column": shared[:, 1],
        "expanded": shared[0].expand(5, 4),
    }
    torch.save(state, tmp_path / "x.pth")
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        for name, tensor in state.items():
            assert read_bytes(checkpoint[name]) == bytes_of(tensor), name
        assert checkpoint["all"].record == checkpoint["half"].record
