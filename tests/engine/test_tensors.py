"""Lazily described tensors equal torch's own, in every layout that torch can save."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streamconv
from streamconv import SourceError
from streamconv.tensors import expressions as tensors
from streamconv.tensors.expressions import MAX_SPAN_BYTES
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
            assert checkpoint[name].tobytes() == bytes_of(tensor), name


@SETTINGS
@given(tensor=views(), max_bytes=st.integers(8, 64))
def test_concatenated_pieces_are_the_tensor(tmp_path: Path, tensor: torch.Tensor, max_bytes: int) -> None:
    torch.save({"x": tensor}, tmp_path / "x.pth")
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        pieces = list(checkpoint["x"].split(max_bytes))
        assert all(piece.info.nbytes <= max_bytes for piece in pieces)
        assert b"".join(piece.tobytes() for piece in pieces) == bytes_of(tensor)


@SETTINGS
@given(tensor=views().filter(lambda t: t.ndim > 0), data=st.data())
def test_rows_are_a_slice_of_dimension_0(tmp_path: Path, tensor: torch.Tensor, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, tensor.shape[0]))
    stop = data.draw(st.integers(start, tensor.shape[0]))
    torch.save({"x": tensor}, tmp_path / "x.pth")
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert checkpoint["x"].rows(start, stop).tobytes() == bytes_of(tensor[start:stop])


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
            assert checkpoint[name].tobytes() == bytes_of(tensor), name
        assert checkpoint["all"].record == checkpoint["half"].record


def test_pieces_of_strided_tensors_span_a_limited_number_of_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "MAX_SPAN_BYTES", 1000)
    wide = torch.randn(20, 100)[:, :4]
    torch.save({"x": wide}, tmp_path / "x.pth")
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        pieces = list(checkpoint["x"].split(1 << 20))
        assert max(piece.span for piece in pieces) == 816  # three rows: 2 * 400 + 16
        assert b"".join(piece.tobytes() for piece in pieces) == bytes_of(wide)


def test_tensor_whose_rows_span_too_many_bytes_is_refused(tmp_path: Path) -> None:
    columns = MAX_SPAN_BYTES // 4 // 1000 + 1
    torch.save({"x": torch.zeros(columns, 1001).t()}, tmp_path / "x.pth")
    with (
        streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint,
        pytest.raises(SourceError, match=r"tensor\.contiguous\(\)"),
    ):
        checkpoint["x"].tobytes()
