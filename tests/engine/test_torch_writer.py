"""The layout of a .pth: byte for byte torch's own, readable by every reader, also beyond 4 GiB."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import streamconv
from streamconv import TensorInfo
from streamconv.formats.segments import LateBytes
from streamconv.formats.torch_writer import pth_segments, write_pth
from streamconv.tensors.evaluation import read_bytes

INFOS = {
    "a": TensorInfo("F32", (3, 5)),
    "empty": TensorInfo("F32", (0, 7)),
    "scalar": TensorInfo("F64", ()),
    "größer": TensorInfo("BF16", (1000,)),
}
DATA = {name: bytes(range(256)) * 8 for name in INFOS}


def data_of(name: str) -> bytes:
    return DATA[name][: INFOS[name].nbytes]


def written(path: Path, prefix: str = "x", infos: Mapping[str, TensorInfo] = INFOS) -> Path:
    with path.open("wb") as file:
        write_pth(file, prefix, infos, lambda name: [data_of(name)])
    return path


@pytest.mark.parametrize("prefix", ["x", "modèle größer", "a" * 200])
def test_layout_is_byte_for_byte_that_of_torchs_own_writer(tmp_path: Path, prefix: str) -> None:
    ours = written(tmp_path / "ours.pth", prefix).read_bytes()
    theirs = torch._C.PyTorchFileWriter(str(tmp_path / f"{prefix}.pth"))
    with zipfile.ZipFile(tmp_path / "ours.pth") as archive:
        names = [name.removeprefix(f"{prefix}/") for name in archive.namelist()]
        records = {name: archive.read(f"{prefix}/{name}") for name in names}
    assert names[-1] == "version"  # torch adds that itself, and then an identifier of its own
    for name in names[:-1]:
        theirs.write_record(name, records[name], len(records[name]))
    theirs.write_end_of_file()
    whole = (tmp_path / f"{prefix}.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / f"{prefix}.pth") as archive:
        more = archive.getinfo(f"{prefix}/.data/serialization_id")
        directory = archive.start_dir
    with zipfile.ZipFile(tmp_path / "ours.pth") as archive:
        start = archive.start_dir
    assert ours[:start] == whole[: more.header_offset]
    size = len(ours) - start - 98  # the three records at the end
    assert ours[start : start + size] == whole[directory : directory + size]
    assert ours[start + size :][:24] == whole[-98:][:24]


def test_every_reader_reads_the_same(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pth")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert [archive.read(f"x/data/{key}") for key in range(len(INFOS))] == [data_of(name) for name in INFOS]
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert [bytes(value.untyped_storage()) for value in loaded.values()] == [data_of(name) for name in INFOS]
    with streamconv.open_checkpoint(path) as checkpoint:
        assert {name: read_bytes(tensor) for name, tensor in checkpoint.items()} == {n: data_of(n) for n in INFOS}
        assert all(tensor.record.crc32 is not None for tensor in checkpoint.values())


@pytest.mark.parametrize("size", [(1 << 32) - 5000, (1 << 32) - 1, 1 << 32, 9 << 30])
def test_sizes_and_offsets_beyond_4_gib_are_read_by_every_reader(tmp_path: Path, size: int) -> None:
    """A sparse file, whose weights are holes."""
    infos = {"large": TensorInfo("U8", (size,)), "after": TensorInfo("F32", (6,)), "last": TensorInfo("F16", (0,))}
    path, at, starts = tmp_path / "x.pth", 0, {}
    with path.open("wb") as file:
        for segment in pth_segments("x", infos):
            if isinstance(segment, str):
                starts[segment] = at
                at += infos[segment].nbytes
                continue
            data = segment.make({"large": 1, "after": 2}) if isinstance(segment, LateBytes) else segment
            file.seek(at)
            file.write(data)
            at += len(data)
    assert path.stat().st_size == at
    for read_local_headers in (True, False):  # exactly, and where torch would have put the records
        with streamconv.open_checkpoint(path, read_local_headers=read_local_headers) as checkpoint:
            assert {name: tensor.info for name, tensor in checkpoint.items()} == infos
            assert {name: tensor.record.range.start for name, tensor in checkpoint.items()} == starts
            assert [tensor.record.crc32 for tensor in checkpoint.values()] == [1, 2, 0]
    assert all(start % 64 == 0 for start in starts.values())
    with zipfile.ZipFile(path) as archive:
        assert [archive.getinfo(f"x/data/{key}").file_size for key in range(3)] == [size, 24, 0]
        with archive.open("x/data/0") as record:  # finds the record's bytes behind its own header
            assert record.read(5) == bytes(5)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert {name: tuple(value.shape) for name, value in loaded.items()} == {n: i.shape for n, i in infos.items()}
    assert loaded["after"].tolist() == [0.0] * 6
