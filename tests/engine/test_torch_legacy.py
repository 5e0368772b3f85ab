"""The format from before torch 1.6: what is read equals what torch reads, in little of the file and of the network."""

import io
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streamconv
from streamconv import NotACheckpointError, SourceError, TruncatedError
from streamconv.formats import torch_legacy
from streamconv.formats.unpickle import PickleError, Pickles
from tests.conftest import make_states, tiny
from tests.engine.test_hostile import STATE, described, read_or_refuse
from tests.engine.test_tensors import DTYPES, NAMES, SETTINGS, bytes_of, views
from tests.file_server import serving

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
def test_every_view_reads_as_torch_loads_it(tmp_path: Path, state: dict[str, torch.Tensor], is_module: bool) -> None:
    if is_module:
        state = {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}
    path = save(state, tmp_path / "x.pth")
    loaded = torch.load(path, weights_only=True)
    with streamconv.open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == list(loaded)
        assert {name: (t.info.dtype, t.info.shape, t.tobytes()) for name, t in checkpoint.items()} == described(loaded)
        records = {tensor.record for tensor in checkpoint.values()}
        storages = [tensor.untyped_storage() for tensor in loaded.values()]  # torch may load an empty one twice
        filled = {storage.data_ptr() for storage in storages if len(storage)}
        assert sum(record.range.length > 0 for record in records) == len(filled)
        assert all(record.crc32 is None for record in records)


@SETTINGS
@given(state=sharing(), piece=st.integers(1, 3000))
def test_the_pieces_in_which_the_pickles_are_read_change_nothing(
    tmp_path: Path, state: dict[str, torch.Tensor], piece: int
) -> None:
    path = save(state | {"n" * 990: torch.ones(1)}, tmp_path / "x.pth")
    with pytest.MonkeyPatch.context() as patch:
        found = read_or_refuse(path)
        patch.setattr(torch_legacy, "_PIECE_BYTES", piece)
        assert read_or_refuse(path) == found is not None


def test_a_string_longer_than_a_piece_is_read() -> None:
    pickled = b"\x80\x02X" + (300_000).to_bytes(4, "little") + b"a" * 300_000 + b".rest"
    file = io.BytesIO(pickled)

    def refuse(*_: object) -> None:
        raise PickleError

    pickles = Pickles(b"", lambda count: file.read(max(count, 100)))
    assert pickles.load(refuse, refuse) == "a" * 300_000
    assert pickled[file.tell() - len(pickles.rest) :] == b"rest"


def test_a_long_name_is_read_wherever_a_piece_ends_and_an_odd_opcode_has_its_place() -> None:
    for before in range(0, 2400, 50):
        start = b"\x80\x02" + b"N" * before + b"c" + b"m" * 400 + b"\n" + b"n" * 400 + b"\n"
        names: list[str] = []
        Pickles(b"", io.BytesIO(start + b".").read).load(
            lambda *name, names=names: names.extend(name), lambda pid: None
        )
        assert names == ["m" * 400, "n" * 400]
        with pytest.raises(PickleError, match=f"0xff at byte {len(start)},"):
            Pickles(b"", io.BytesIO(start + b"\xff").read).load(lambda *name: None, lambda pid: None)


def test_a_state_dict_with_its_metadata_is_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    with streamconv.open_checkpoint(save(module.state_dict(), tmp_path / "x.pth")) as checkpoint:
        assert checkpoint["weight"].tobytes() == bytes_of(module.weight)
        assert checkpoint.fingerprint != ""


def test_only_the_index_is_read(tmp_path: Path, read_counts: list[int]) -> None:
    path = save({f"layer.{i}": torch.zeros(1 << 20) for i in range(8)}, tmp_path / "big.pth")
    with streamconv.open_checkpoint(path) as checkpoint:
        assert len(checkpoint) == 8
    assert 0 < sum(read_counts) < 70_000


def test_the_fingerprint_stands_for_the_index(tmp_path: Path) -> None:
    path = save({"x": torch.ones(20_000)}, tmp_path / "x.pth")
    whole = path.read_bytes()
    prints = []
    for data in (whole, whole[:-1] + b"?", whole.replace(b"x", b"y", 1)):
        path.write_bytes(data)
        with streamconv.open_checkpoint(path) as checkpoint:
            prints.append(checkpoint.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_conversion_is_that_of_the_zip(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    state["norm.bias"] = torch.stack([state["norm.bias"], state["norm.weight"]])[0]
    torch.save(state, tmp_path / "new.pth")
    save(state, tmp_path / "old.pth")
    for name in ("new", "old"):
        done = streamconv.convert(tmp_path / f"{name}.pth", tmp_path / name, max_shard_size="300KB")
        assert done.is_crc_checked == (name == "new")
    files = sorted(path.name for path in (tmp_path / "new").iterdir() if path.name != "streamconv.json")
    assert len(files) > 4
    for name in files:
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes(), name
    found = streamconv.verify(tmp_path / "old", tmp_path / "old.pth", device="cpu")
    assert found.passed


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_cut_download_is_called_one(tmp_path: Path, share: float) -> None:
    path = save({"x": torch.ones(100_000)}, tmp_path / "x.pth")
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(TruncatedError, match=r"cut short\. Fetch it again"):
        streamconv.open_checkpoint(path)


def test_what_torch_itself_cannot_load_is_refused(tmp_path: Path) -> None:
    path = save({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.pth")
    with pytest.raises(AttributeError, match="no attribute 'dtype'"):
        torch.load(path, weights_only=True)
    with pytest.raises(SourceError, match="such as float8"):
        streamconv.open_checkpoint(path)


def test_another_version_of_the_protocol_is_refused(tmp_path: Path) -> None:
    path = save({"x": torch.ones(2)}, tmp_path / "x.pth")
    path.write_bytes(path.read_bytes().replace(b"M\xe9\x03.", b"M\xea\x03.", 1))
    with pytest.raises(NotACheckpointError, match="no such file"):
        streamconv.open_checkpoint(path)


def test_any_cut_is_refused(tmp_path: Path) -> None:
    state = {name: value for name, value in STATE.items() if value.dtype in LEGACY_DTYPES}
    whole = save(state, tmp_path / "x.pth").read_bytes()
    assert read_or_refuse(tmp_path / "x.pth") == described(state)
    for size in range(len(whole)):
        (tmp_path / "y.pth").write_bytes(whole[:size])
        assert read_or_refuse(tmp_path / "y.pth") is None, size
    (tmp_path / "y.pth").write_bytes(whole + b"\0")
    assert read_or_refuse(tmp_path / "y.pth") is None


@pytest.mark.parametrize("is_exact", [True, False])
def test_at_an_address_little_is_asked_for(tmp_path: Path, read_local_headers: bool) -> None:
    state = {f"{kind}.{i}": torch.randn(n) for i in range(20) for kind, n in (("weight", 200_000), ("bias", 100))}
    path = save(state, tmp_path / "x.pth")
    with serving(tmp_path) as server:
        with streamconv.open_checkpoint(f"{server.url}/x.pth", read_local_headers=read_local_headers) as checkpoint:
            assert len(server.requests) <= (2 + len(state) if read_local_headers else 1)
            assert server.sent < 1_000_000
            assert {name: tensor.tobytes() for name, tensor in checkpoint.items()} == {
                name: value.numpy().tobytes() for name, value in state.items()
            }
        with streamconv.open_checkpoint(path) as here:
            assert here.fingerprint == checkpoint.fingerprint
