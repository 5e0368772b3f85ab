"""Which ranges of a weight file may be copied by its store: whole records with CRC-32s, and nothing else."""

from pathlib import Path

import pytest

from streamconv.files.base import ByteRange, FileRef
from streamconv.output.stores import part_layout
from streamconv.output.stores.stretches import CopiedRange, cut_into_stretches
from streamconv.planning.shards import Shard
from streamconv.tensors.computed import Cast
from streamconv.tensors.expressions import Expression, Read, Record
from streamconv.tensors.info import TensorInfo, contiguous_strides

SOURCE, OTHER = FileRef(Path("x.pth"), 1 << 30), FileRef(Path("y.pth"), 1 << 30)
LEAST, PART = 64, 96


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_layout, "MIN_PART_BYTES", LEAST)


def record(name: str, nbytes: int, crc32: int | None = 7, file: FileRef = SOURCE) -> Record:
    return Record(file, name, ByteRange(1_000_000, nbytes), crc32)


def read(of: Record, offset: int = 0, nbytes: int | None = None) -> Read:
    shape = ((nbytes if nbytes is not None else of.range.length) // 4,)
    return Read(TensorInfo("F32", shape), of, offset, contiguous_strides(shape))


def copied(*tensors: Expression, header: bytes = b"h" * 100) -> list[tuple[str, int, int]]:
    """Return what is copied: names, and offsets and lengths in the records."""
    shard = Shard("model.safetensors", header, tuple((f"t{i}", tensor) for i, tensor in enumerate(tensors)))
    found = cut_into_stretches(shard, lambda file: file == SOURCE, PART)
    ranges = [each for each in found if isinstance(each, CopiedRange)]
    return [(each.name, each.read.offset, each.read.info.nbytes) for each in ranges]


def test_whole_records_are_copied_except_for_what_completes_the_part_before_them() -> None:
    one, other = read(record("a", 1_000)), read(record("b", 2_000))
    assert copied(one, other) == [("t0", 64, 936), ("t1", 0, 2_000)]  # 100 bytes of header: 96, 4, and 64 of the tensor


def test_parts_of_a_record_are_copied_if_the_file_takes_all_of_them() -> None:
    whole = record("qkv", 3_000)
    chunks = [read(whole, at, 1_000) for at in (2_000, 0, 1_000)]
    assert [length for _, _, length in copied(*chunks, header=b"h" * 96)] == [1_000] * 3
    assert copied(*chunks[:2]) == []  # the CRC-32 of the rest is not known
    assert copied(*chunks, chunks[0]) == []  # nor of what is taken twice
    half = Cast(TensorInfo("BF16", (250,)), chunks[0])
    assert copied(*chunks, half) == []  # bytes of it are read, too


@pytest.mark.parametrize(
    "tensor",
    [
        read(record("no CRC-32", 1_000, None)),
        read(record("elsewhere", 1_000, file=OTHER)),
        Cast(TensorInfo("BF16", (250,)), read(record("cast", 1_000))),
        Read(TensorInfo("F32", (10, 25)), record("transposed", 1_000), 0, (1, 10)),
        read(record("small", 100)),
        read(record("empty", 0)),
    ],
    ids=lambda tensor: next(tensor.leaves()).record.name,
)
def test_everything_else_is_uploaded(tensor: Expression) -> None:
    assert copied(tensor) == []


def test_stretches_are_the_whole_file_in_order() -> None:
    tensors = [read(record("a", 1_000)), read(record("b", 40)), read(record("c", 500)), read(record("d", 20, None))]
    shard = Shard("m", b"h" * 8, tuple((f"t{i}", tensor) for i, tensor in enumerate(tensors)))
    found, bytes_of = [], {"a": 0, "b": 0, "c": 0, "d": 0}
    for stretch in cut_into_stretches(shard, lambda file: True, PART):
        for each in [(stretch.name, stretch.read)] if isinstance(stretch, CopiedRange) else stretch:
            if isinstance(each, tuple):
                [leaf] = each[1].leaves()
                assert leaf.offset == bytes_of[leaf.record.name]
                bytes_of[leaf.record.name] += leaf.info.nbytes
                found.append(each[0])
            else:
                assert each == shard.header
    assert found == sorted(found)
    assert bytes_of == {"a": 1_000, "b": 40, "c": 500, "d": 20}
