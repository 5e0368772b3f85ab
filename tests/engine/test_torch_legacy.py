"""The format from before torch 1.6: read like torch reads it, with few bytes read from the file or the network."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streamconv
from streamconv import NotACheckpointError, SourceError, TruncatedError
from streamconv.formats import torch_legacy
from streamconv.tensors.evaluation import read_bytes
from tests import api
from tests.checkpoints import (
    DTYPES,
    EVERY_KIND,
    NAMES,
    SETTINGS,
    bytes_of,
    described,
    make_states,
    read_or_refuse,
    views,
)
from tests.file_server import serving
from tests.support import tiny

LEGACY_DTYPES = set(DTYPES[:11])  # torch cannot load the others from this format


def save(state: object, path: Path) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


@st.composite
def sharing(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors by name, some of which are views of others, at an offset."""
    state = draw(st.dictionaries(NAMES, views().filter(lambda view: view.dtype in LEGACY_DTYPES), max_size=5))
    for name, tensor in list(state.items()):
        if tensor.ndim and draw(st.booleans()):
            state[f"{name} rows"] = tensor[draw(st.integers(0, tensor.shape[0])) :]
        if draw(st.booleans()):
            state[f"{name} again"] = tensor
    return state


@SETTINGS
@given(state=sharing(), is_module=st.booleans())
def test_every_legacy_view_is_read_like_torch_loads_it(
    tmp_path: Path, state: dict[str, torch.Tensor], is_module: bool
) -> None:
    if is_module:
        state = {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}
    path = save(state, tmp_path / "x.pth")
    loaded = torch.load(path, weights_only=True)
    with streamconv.open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == list(loaded)
        assert {name: (t.info.dtype, t.info.shape, read_bytes(t)) for name, t in checkpoint.items()} == described(
            loaded
        )
        records = {tensor.record for tensor in checkpoint.values()}
        storages = [tensor.untyped_storage() for tensor in loaded.values()]  # torch may load an empty one twice
        filled = {storage.data_ptr() for storage in storages if len(storage)}
        assert sum(record.range.length > 0 for record in records) == len(filled)
        assert all(record.crc32 is None for record in records)


@SETTINGS
@given(state=sharing(), piece=st.integers(1, 3000))
def test_piece_size_of_pickle_reads_does_not_change_the_result(
    tmp_path: Path, state: dict[str, torch.Tensor], piece: int
) -> None:
    path = save(state | {"n" * 990: torch.ones(1)}, tmp_path / "x.pth")
    with pytest.MonkeyPatch.context() as patch:
        found = read_or_refuse(path)
        patch.setattr(torch_legacy, "_PIECE_BYTES", piece)
        assert read_or_refuse(path) == found is not None


def test_state_dict_with_metadata_is_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    with streamconv.open_checkpoint(save(module.state_dict(), tmp_path / "x.pth")) as checkpoint:
        assert read_bytes(checkpoint["weight"]) == bytes_of(module.weight)
        assert checkpoint.fingerprint != ""


def test_opening_a_legacy_file_reads_only_the_index(tmp_path: Path, read_counts: list[int]) -> None:
    path = save({f"layer.{i}": torch.zeros(1 << 20) for i in range(8)}, tmp_path / "big.pth")
    with streamconv.open_checkpoint(path) as checkpoint:
        assert len(checkpoint) == 8
    assert 0 < sum(read_counts) < 70_000


def test_legacy_fingerprint_depends_on_the_index(tmp_path: Path) -> None:
    path = save({"x": torch.ones(20_000)}, tmp_path / "x.pth")
    whole = path.read_bytes()
    prints = []
    for data in (whole, whole[:-1] + b"?", whole.replace(b"x", b"y", 1)):
        path.write_bytes(data)
        with streamconv.open_checkpoint(path) as checkpoint:
            prints.append(checkpoint.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_legacy_file_converts_to_the_same_bytes_as_a_zip(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    state["norm.bias"] = torch.stack([state["norm.bias"], state["norm.weight"]])[0]
    torch.save(state, tmp_path / "new.pth")
    save(state, tmp_path / "old.pth")
    for name in ("new", "old"):
        done = api.convert(tmp_path / f"{name}.pth", tmp_path / name, max_shard_size="300KB")
        assert done.is_crc_checked == (name == "new")
    files = sorted(path.name for path in (tmp_path / "new").iterdir() if path.name != "streamconv.json")
    assert len(files) > 4
    for name in files:
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes(), name


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_truncated_legacy_file_is_reported_as_cut_short(tmp_path: Path, share: float) -> None:
    path = save({"x": torch.ones(100_000)}, tmp_path / "x.pth")
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(TruncatedError, match=r"cut short\. Fetch it again"):
        streamconv.open_checkpoint(path)


def test_dtypes_that_torch_cannot_load_are_refused(tmp_path: Path) -> None:
    path = save({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.pth")
    with pytest.raises(AttributeError, match="no attribute 'dtype'"):
        torch.load(path, weights_only=True)
    with pytest.raises(SourceError, match="such as float8"):
        streamconv.open_checkpoint(path)


def test_other_protocol_version_is_refused(tmp_path: Path) -> None:
    path = save({"x": torch.ones(2)}, tmp_path / "x.pth")
    path.write_bytes(path.read_bytes().replace(b"M\xe9\x03.", b"M\xea\x03.", 1))
    with pytest.raises(NotACheckpointError, match="but is not one"):
        streamconv.open_checkpoint(path)


def test_legacy_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    state = {name: value for name, value in EVERY_KIND.items() if value.dtype in LEGACY_DTYPES}
    whole = save(state, tmp_path / "x.pth").read_bytes()
    assert read_or_refuse(tmp_path / "x.pth") == described(state)
    for size in range(len(whole)):
        (tmp_path / "y.pth").write_bytes(whole[:size])
        assert read_or_refuse(tmp_path / "y.pth") is None, size
    (tmp_path / "y.pth").write_bytes(whole + b"\0")
    assert read_or_refuse(tmp_path / "y.pth") is None


@pytest.mark.parametrize("read_local_headers", [True, False])
def test_opening_a_remote_legacy_file_needs_few_requests(tmp_path: Path, read_local_headers: bool) -> None:
    state = {f"{kind}.{i}": torch.randn(n) for i in range(20) for kind, n in (("weight", 200_000), ("bias", 100))}
    path = save(state, tmp_path / "x.pth")
    with serving(tmp_path) as server:
        with streamconv.open_checkpoint(f"{server.url}/x.pth", read_local_headers=read_local_headers) as checkpoint:
            assert len(server.requests) <= (2 + len(state) if read_local_headers else 1)
            assert server.sent < 1_000_000
            assert {name: read_bytes(tensor) for name, tensor in checkpoint.items()} == {
                name: value.numpy().tobytes() for name, value in state.items()
            }
        with streamconv.open_checkpoint(path) as here:
            assert here.fingerprint == checkpoint.fingerprint
