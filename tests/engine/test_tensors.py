"""Lazily described tensors against torch's own, in every layout that torch can save."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamconv
from streamconv import SourceError
from streamconv.tensors import expressions as tensors
from streamconv.tensors.expressions import MAX_SPAN_BYTES

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32,
    torch.uint64,
)  # fmt: skip
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=50).filter(str.isprintable)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Row-major, as torch sees them."""
    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).untyped_storage().tolist())


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A view of random bytes: sliced, stepped, permuted, expanded, empty, 0-d, at an offset."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = int(torch.tensor(shape).prod()) if shape else 1
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    for dim in range(tensor.ndim):
        start, step = draw(st.integers(0, 2)), draw(st.integers(1, 3))
        tensor = tensor.narrow(dim, min(start, tensor.shape[dim]), max(0, tensor.shape[dim] - start))
        if tensor.shape[dim]:
            tensor = tensor[(slice(None),) * dim + (slice(None, None, step),)]
    if draw(st.booleans()) and tensor.ndim:
        tensor = tensor.permute(draw(st.permutations(range(tensor.ndim))))
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(draw(st.integers(0, tensor.ndim))).expand(
            [draw(st.integers(1, 3)) if n == 1 else n for n in tensor.unsqueeze(0).shape]
        ) if tensor.ndim == 0 else tensor  # fmt: skip
    return tensor


@SETTINGS
@given(state=st.dictionaries(NAMES, views(), max_size=5))
def test_every_view_reads_as_torch_loads_it(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
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
def test_pieces_joined_are_the_tensor(tmp_path: Path, tensor: torch.Tensor, max_bytes: int) -> None:
    torch.save({"x": tensor}, tmp_path / "x.pth")
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        pieces = list(checkpoint["x"].split(max_bytes))
        assert all(piece.info.nbytes <= max_bytes for piece in pieces)
        assert b"".join(piece.tobytes() for piece in pieces) == bytes_of(tensor)


@SETTINGS
@given(tensor=views().filter(lambda t: t.ndim > 0), data=st.data())
def test_rows_are_a_slice_of_dim_0(tmp_path: Path, tensor: torch.Tensor, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, tensor.shape[0]))
    stop = data.draw(st.integers(start, tensor.shape[0]))
    torch.save({"x": tensor}, tmp_path / "x.pth")
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert checkpoint["x"].rows(start, stop).tobytes() == bytes_of(tensor[start:stop])


def test_channels_last_and_shared_storages_come_out_right(tmp_path: Path) -> None:
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


def test_no_piece_spans_more_than_is_worth_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MAX_SPAN_BYTES", 1000)
    wide = torch.randn(20, 100)[:, :4]
    torch.save({"x": wide}, tmp_path / "x.pth")
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        pieces = list(checkpoint["x"].split(1 << 20))
        assert max(piece.span for piece in pieces) == 816  # three rows: 2 * 400 + 16
        assert b"".join(piece.tobytes() for piece in pieces) == bytes_of(wide)


def test_a_tensor_whose_rows_span_too_much_is_refused_by_name(tmp_path: Path) -> None:
    columns = MAX_SPAN_BYTES // 4 // 1000 + 1
    torch.save({"x": torch.zeros(columns, 1001).t()}, tmp_path / "x.pth")
    with (
        streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint,
        pytest.raises(SourceError, match=r"tensor\.contiguous\(\)"),
    ):
        checkpoint["x"].tobytes()
