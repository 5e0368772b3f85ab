"""Estimates of the bytes read for tensors that are not contiguous, and the refusal of those that take too many."""

from pathlib import Path

import pytest

from streamconv.errors import MappingError
from streamconv.files.base import ByteRange, FileRef
from streamconv.planning.reads import estimate_bytes_read, refuse_unstreamable
from streamconv.tensors.computed import cast
from streamconv.tensors.expressions import Expression, Read, Record
from streamconv.tensors.info import DtypeCode, TensorInfo
from streamconv.tensors.runs import source_blocks
from streamconv.tensors.tiles import tiles


def view(shape: tuple[int, ...], strides: tuple[int, ...], dtype: DtypeCode = "F32") -> Read:
    record = Record(FileRef(Path("x.pth"), 1 << 40), "x/data/0", ByteRange(0, 1 << 40))
    return Read(TensorInfo(dtype, shape), record, 0, strides)


@pytest.mark.parametrize(
    "tensor",
    [view((4_096, 4_096), (1, 4_096)), view((3_000, 700), (1_400, 2)), view((1_024, 1_024), (24_576, 24))],
    ids=["transposed", "every second column", "one layer of many"],
)
def test_estimate_is_about_what_is_read(tensor: Read) -> None:
    blocks = [block.runs for tile in tiles(tensor) for block in source_blocks(tile)]
    read = sum(runs.nbytes + runs.count * 8_192 for runs in blocks)
    assert read <= estimate_bytes_read(tensor) <= 2 * read


@pytest.mark.parametrize("dtype", ["F32", "F16", "F64"])
@pytest.mark.parametrize("cast_to", ["F32", "F16"])
@pytest.mark.parametrize("rows", [31, 32, 33, 63, 1_024, 1_152, 2_047, 2_048, 2_896, 4_096, 65_537, 100_000])
def test_transposed_matrices_of_every_size_are_streamed(dtype: DtypeCode, cast_to: DtypeCode, rows: int) -> None:
    largest = cast(view((rows, 32_000), (1, rows), dtype), cast_to)
    refuse_unstreamable({f"{i}": largest for i in range(100)})
    assert estimate_bytes_read(largest) <= 64 * largest.info.nbytes


def test_views_of_ordinary_checkpoints_are_streamed() -> None:
    views = {
        "channels last": view((1_536, 3, 14, 14), (588, 1, 42, 3)),
        "columns of a stacked matrix": view((1_536,), (40,)),
        "one layer of many": view((1_024, 1_024), (1_024 * 24, 24)),
        "a part of a wide matrix": view((1_024, 64), (4_096, 1)),
        "one number": view((8_192, 1_536), (0, 0)),
        "a column of a large matrix": view((384,), (10_000,)),
    }
    refuse_unstreamable({f"{name} {i}": each for name, each in views.items() for i in range(50)})


@pytest.mark.parametrize("slow", [view((64, 64), (300_000, 4_700)), view((384,), (10_000,))], ids=["matrix", "column"])
def test_many_small_tensors_that_are_read_with_large_gaps_are_refused(slow: Read) -> None:
    transposed: dict[str, Expression] = {f"transposed {i}": view((768, 768), (1, 768)) for i in range(1_000)}
    names = [f"blocks.{i}.mlp.fc1.weight" for i in range(10_000)]
    with pytest.raises(MappingError) as caught:
        refuse_unstreamable({**transposed, **dict.fromkeys(names, slow)})
    assert [problem.partition(":")[0] for problem in caught.value.problems] == names[:1_000]
    assert caught.value.problems[0] == (
        f"blocks.0.mlp.fc1.weight: x.pth: the tensor {slow.info} in x/data/0 has strides {list(slow.strides)}, so "
        f"reading its {slow.info.nbytes:,} bytes takes as long as reading {estimate_bytes_read(slow):,}. Save it again "
        "after tensor.contiguous()."
    )


def test_estimate_takes_no_longer_for_more_tiles() -> None:
    assert estimate_bytes_read(view((1 << 40, 1 << 10), (1, 1 << 11))) > 1 << 50
