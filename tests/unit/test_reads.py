"""How many bytes are read for tensors that are not contiguous, and which of them are refused for it."""

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamconv.errors import MappingError
from streamconv.files.base import ByteRange, FileRef
from streamconv.files.local import LocalFile
from streamconv.files.reader import Reader
from streamconv.planning.reads import refuse_unstreamable
from streamconv.tensors import expressions
from streamconv.tensors.expressions import MAX_SPAN_BYTES, Record, SourceTensor
from streamconv.tensors.info import DtypeCode, TensorInfo


def view(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: DtypeCode = "F32", cast_to: DtypeCode | str = ""
) -> SourceTensor:
    record = Record(FileRef(Path("x.pth"), 1 << 40), "x/data/0", ByteRange(0, 1 << 40))
    return SourceTensor(TensorInfo(dtype, shape), record, 0, strides, cast_to)  # type: ignore[arg-type]


@given(
    dims=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 1, 2, 7, 13])), min_size=1, max_size=3),
    max_bytes=st.integers(8, 80),
    cast_to=st.sampled_from(["", "F64"]),
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_estimate_equals_the_bytes_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_counts: list[int],
    dims: list[tuple[int, int]],
    max_bytes: int,
    cast_to: str,
) -> None:
    monkeypatch.setattr(expressions, "MAX_SPAN_BYTES", 1_000)
    (tmp_path / "x").write_bytes(bytes(4_000))
    shape, strides = zip(*dims, strict=True)
    with closing(LocalFile(tmp_path / "x")) as file:
        reader, record = Reader([file]), Record(file.ref, "x", ByteRange(0, 4_000))
        tensor = replace(view(shape, strides, cast_to=cast_to), record=record)
        read_counts.clear()
        for piece in tensor.split(max_bytes):
            piece.read_into(memoryview(bytearray(piece.info.nbytes)), reader)
    assert sum(read_counts) == tensor.bytes_read(max_bytes)


@pytest.mark.parametrize("dtype", ["F32", "F16", "F64"])
@pytest.mark.parametrize("cast_to", ["", "F32", "F16"])
@pytest.mark.parametrize("rows", [31, 32, 33, 63, 1_024, 1_152, 2_047, 2_048, 2_896, 4_096, 65_537, 100_000])
def test_transposed_matrices_of_every_size_are_streamed(dtype: DtypeCode, cast_to: str, rows: int) -> None:
    itemsize = TensorInfo(dtype, ()).itemsize
    columns = (MAX_SPAN_BYTES // itemsize - 1) // rows + 1  # the largest that can be read at all
    largest = view((rows, columns), (1, rows), dtype, cast_to)
    assert largest.span > MAX_SPAN_BYTES - 2 * rows * itemsize
    refuse_unstreamable({f"{i}": largest for i in range(100)})


def test_other_honest_views_are_streamed() -> None:
    views = {
        "channels last": view((1_536, 3, 14, 14), (588, 1, 42, 3)),
        "columns of a stacked matrix": view((1_536,), (40,)),
        "one layer of many": view((1_024, 1_024), (1_024 * 24, 24)),
        "a part of a wide matrix": view((1_024, 64), (4_096, 1)),
        "one number": view((8_192, 1_536), (0, 0)),
        "a column of a large matrix": view((384,), (10_000,)),
    }
    refuse_unstreamable({f"{name} {i}": each for name, each in views.items() for i in range(50)})


def crossing(shape: tuple[int, int]) -> SourceTensor:
    """Return a matrix each of whose rows spans as much of its storage as a piece may."""
    return view(shape, (1, (MAX_SPAN_BYTES // 4 - 1) // (shape[1] - 1)))


def test_large_crossing_strides_are_read_no_more_often_than_a_transposed_matrix() -> None:
    refuse_unstreamable({f"{i}": crossing((1_536, 684)) for i in range(100)})


@pytest.mark.parametrize("slow", [crossing((128, 32)), view((384,), (10_000,))], ids=["matrix", "column"])
def test_many_small_tensors_that_are_read_with_large_gaps_are_refused(slow: SourceTensor) -> None:
    transposed = {f"transposed {i}": view((768, 768), (1, 768)) for i in range(100)}
    names = [f"blocks.{i}.mlp.fc1.weight" for i in range(100)]
    with pytest.raises(MappingError) as caught:
        refuse_unstreamable({**transposed, **dict.fromkeys(names, slow)})
    assert [problem.partition(":")[0] for problem in caught.value.problems] == names
    assert caught.value.problems[0] == (
        f"blocks.0.mlp.fc1.weight: x.pth: the tensor {slow.info} in x/data/0 has strides {list(slow.strides)}, so "
        f"that {slow.bytes_read(512 << 10):,} bytes would be read for its {slow.info.nbytes:,}. Save it again after "
        "tensor.contiguous()."
    )


def test_estimate_takes_no_longer_for_more_pieces() -> None:
    huge = view((1 << 40, 1 << 10), (1, 1 << 11))
    assert huge.bytes_read(512 << 10) == math.ceil((1 << 40) / 128) * huge.rows(0, 128).span
