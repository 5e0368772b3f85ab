"""Archives of numpy.savez are read like numpy reads them, and nothing in them is unpickled."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import streamconv
from streamconv import CorruptError, NotACheckpointError, SourceError
from streamconv.tensors.evaluation import read_bytes
from tests import api
from tests.checkpoints import make_states
from tests.file_server import FileServer
from tests.hostile import Refusal
from tests.support import model_files, tiny

DTYPES = ("<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "|i1", "<u8", "<u4", "<u2", "|u1", "|b1", "<c8")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text("abc./_0", min_size=1, max_size=12).filter(lambda name: name.strip("/.") == name and "//" not in name),
        st.tuples(
            st.sampled_from(DTYPES).flatmap(
                lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
            ),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_arrays_are_read_like_numpy_reads_them(tmp_path: Path, found: dict[str, tuple[Any, bool]]) -> None:
    given_arrays = {name: np.asfortranarray(value) if is_f else value for name, (value, is_f) in found.items()}
    np.savez(tmp_path / "x.npz", **given_arrays)
    with np.load(tmp_path / "x.npz") as wanted, streamconv.open_checkpoint(tmp_path / "x.npz") as checkpoint:
        assert {name: read_bytes(tensor) for name, tensor in checkpoint.items()} == {
            name: wanted[name].tobytes() for name in wanted
        }
        assert {name: tensor.info.shape for name, tensor in checkpoint.items()} == {
            name: wanted[name].shape for name in wanted
        }


def save(path: Path, **more: Any) -> dict[str, Any]:
    """Write a model as numpy.savez does; returns its arrays by name."""
    state = {name: value.numpy() for name, value in make_states(tiny())[0].items()}
    np.savez(path, **state, **more)
    return state


def test_model_becomes_the_one_of_a_pth(tmp_path: Path) -> None:
    torch.save(make_states(tiny())[0], tmp_path / "x.pth")
    save(tmp_path / "x.npz", args=np.array({"lr": 1}), note=np.array("text"))
    done = api.convert(tmp_path / "x.npz", tmp_path / "from_npz")
    api.convert(tmp_path / "x.pth", tmp_path / "from_pth")
    assert done.is_crc_checked
    assert model_files(tmp_path / "from_npz") == model_files(tmp_path / "from_pth")


def test_arrays_in_fortran_order_become_the_same_model(tmp_path: Path) -> None:
    state = save(tmp_path / "c.npz")
    np.savez(tmp_path / "f.npz", **{name: np.asfortranarray(value) for name, value in state.items()})
    for name in ("c", "f"):
        assert api.convert(tmp_path / f"{name}.npz", tmp_path / name).is_crc_checked
    assert model_files(tmp_path / "c") == model_files(tmp_path / "f")


def test_weights_are_not_read_twice(tmp_path: Path, read_counts: list[int]) -> None:
    """The CRC-32 of a record covers the header, too, which is not read again with the weights."""
    save(tmp_path / "x.npz")
    size = (tmp_path / "x.npz").stat().st_size
    assert api.convert(tmp_path / "x.npz", tmp_path / "out").is_crc_checked
    assert sum(read_counts) < 1.1 * size


def test_archive_at_a_url_is_read_and_downloaded(server: FileServer, tmp_path: Path) -> None:
    save(server.folder / "x.npz")
    for stream in (True, False):
        api.convert(f"{server.url}/x.npz", tmp_path / str(stream), stream=stream)
    api.convert(server.folder / "x.npz", tmp_path / "local")
    assert model_files(tmp_path / "True") == model_files(tmp_path / "False") == model_files(tmp_path / "local")


@pytest.mark.parametrize("where", ["header", "data"])
def test_damage_is_found_by_the_crc(tmp_path: Path, where: str) -> None:
    save(tmp_path / "x.npz")
    data = bytearray((tmp_path / "x.npz").read_bytes())
    start = data.index(b"\x93NUMPY", data.index(b"blocks.1.mlp.fc2.weight.npy"))
    if where == "header":
        data[start + 127] = ord(" ")  # instead of a line feed, which changes nothing but the CRC-32
    else:
        data[start + 128 + 1000] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(CorruptError, match=r"record blocks\.1\.mlp\.fc2\.weight\.npy, .* does not match its CRC-32"):
        api.convert(tmp_path / "x.npz", tmp_path / "out")


def test_fingerprint_depends_on_every_weight(tmp_path: Path) -> None:
    prints = []
    for value in (0.0, 0.0, 1.0):
        np.savez(tmp_path / "x.npz", x=np.full(4, value))
        with streamconv.open_checkpoint(tmp_path / "x.npz") as checkpoint:
            prints.append(checkpoint.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def npy(header: bytes, data: bytes = bytes(8), version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<L", len(header)) + header + data


def archive(path: Path, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in records.items():
            file.writestr(name, data)
    return path


HEADERS = {
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n": (2,),
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (2L,)}": (2,),  # of Python 2
    b'{"shape": (2, 1), "fortran_order": True, "descr": "<f4"}   ': (2, 1),
    b"{'descr': '<f8', 'fortran_order': False, 'shape': (), }": (),
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("version", [b"\1\0", b"\2\0"])
@pytest.mark.filterwarnings("ignore:.*Python 2")
def test_headers_of_other_writers_are_read_like_numpy_reads_them(tmp_path: Path, header: bytes, version: bytes) -> None:
    data = npy(header, struct.pack("<2f", 1, 2), version)
    assert np.load(io.BytesIO(data)).shape == HEADERS[header]
    with streamconv.open_checkpoint(archive(tmp_path / "x.npz", {"a.npy": data})) as checkpoint:
        assert checkpoint["a"].info.shape == HEADERS[header]
        assert read_bytes(checkpoint["a"]) == struct.pack("<2f", 1, 2)


F4 = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "big-endian": (lambda: npy(F4.replace(b"<f4", b">f4")), r"a is big-endian \(>f4\)\. Save it as little-endian"),
    "objects": (lambda: npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"), "no arrays of numbers"),
    "a structured dtype": (
        lambda: npy(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }"), "no arrays of numbers"
    ),
    "bfloat16, which numpy cannot name": (lambda: npy(F4.replace(b"f4", b"V2")), "a is a numpy array of <V2"),
    "a terminal's escape": (lambda: npy(F4.replace(b"<f4", b"\x1b[2J")), r"numpy array of \\x1b\[2J"),
    "another shape": (lambda: npy(F4.replace(b"2,", b"3,")), r"8 bytes after its header, but F32 \[3\] has 12"),
    "a negative size": (lambda: npy(F4.replace(b"2,", b"-2,")), "damaged header"),
    "a huge size": (lambda: npy(F4.replace(b"2,", b"9" * 30 + b",")), "damaged header"),
    "sizes that wrap around 64 bits": (lambda: npy(F4.replace(b"2,", b"4611686018427387904, 4")), "damaged header"),
    "a call": (lambda: npy(F4.replace(b"(2,)", b"exit()")), "damaged header"),
    "more than a dict": (lambda: npy(F4 + b"; exit()"), "damaged header"),
    "no shape": (lambda: npy(b"{'descr': '<f4', 'fortran_order': False}"), "damaged header"),
    "another order": (lambda: npy(F4.replace(b"False", b"(0,)")), "damaged header"),
    "an endless header": (lambda: npy(F4 + b" " * 60_000), "a header of 60,0"),
    "a header beyond the record": (lambda: b"\x93NUMPY\1\0\xff\xff" + F4, "ends within its header"),
    "a record that is no array": (lambda: b"hello", "is not a numpy array"),
    "an empty record": (lambda: b"", "is not a numpy array"),
    "a version of the future": (lambda: npy(F4, version=b"\x09\0"), "is not a numpy array"),
}  # fmt: skip


@pytest.mark.parametrize("attack", REFUSED)
def test_other_arrays_are_refused_by_name(tmp_path: Path, attack: str, refusal: Refusal) -> None:
    make, message = REFUSED[attack]
    archive(tmp_path / "x.npz", {"a.npy": make()})
    with pytest.raises(SourceError, match=message):
        streamconv.open_checkpoint(tmp_path / "x.npz")
    assert "x.npz" in refusal(tmp_path / "x.npz")


def test_many_arrays_take_little_time(tmp_path: Path, refusal: Refusal) -> None:
    """A million records, or thousands of headers that numpy would take long to parse."""
    archive(tmp_path / "x.npz", {f"{i}.npy": npy(b"{" + b"'shape': (" * 90) for i in range(5_000)})
    assert "damaged header" in refusal(tmp_path / "x.npz")


def test_object_array_that_a_model_needs_is_named(tmp_path: Path) -> None:
    state: dict[str, Any] = {name: value.numpy() for name, value in make_states(tiny())[0].items()}
    np.savez(tmp_path / "x.npz", **{**state, "norm.weight": np.array({"a": 1})})
    with pytest.raises(SourceError, match=r"norm\.weight is a numpy array of \|O, which is not read"):
        api.plan(tmp_path / "x.npz")


def test_compressed_archive_is_refused_with_a_fix_that_works(tmp_path: Path) -> None:
    state = save(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "x.npz", **state)
    with pytest.raises(NotACheckpointError, match=r"compressed.*np\.savez\(OUT, \*\*np\.load\(FILE\)\)"):
        streamconv.open_checkpoint(tmp_path / "x.npz")
    np.savez(tmp_path / "out.npz", **np.load(tmp_path / "x.npz"))
    assert api.plan(tmp_path / "out.npz").dimensions == tiny()


def test_single_array_is_refused_with_a_fix(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(NotACheckpointError, match=r"is a single numpy array.*np\.savez\(FILE, \*\*state_dict\)"):
        streamconv.open_checkpoint(tmp_path / "x.npy")


def test_arrays_without_names_are_refused_with_a_fix(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.ones(3), np.ones(2))
    with pytest.raises(NotACheckpointError, match=r"without names, such as arr_0\..*np\.savez\(FILE, \*\*state_dict"):
        streamconv.open_checkpoint(tmp_path / "x.npz")


def test_converted_model_in_an_archive_is_converted_again(tmp_path: Path) -> None:
    save(tmp_path / "x.npz")
    api.convert(tmp_path / "x.npz", tmp_path / "out", num_heads=4)
    state = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_bytes((tmp_path / "out" / "config.json").read_bytes())
    np.savez(tmp_path / "again" / "weights.npz", **{name: value.numpy() for name, value in state.items()})
    api.convert(tmp_path / "again", tmp_path / "out2")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "out2")
