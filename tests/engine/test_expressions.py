"""Any composition of expressions equals torch bit for bit, however it is cut and read, in bounded memory."""

import math
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamconv.errors import UsageError
from streamconv.files.base import ByteRange
from streamconv.files.inline import inline_ref
from streamconv.files.local import LocalFile
from streamconv.files.reader import Reader
from streamconv.tensors import evaluation, gather, packages, runs, tiles
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.computed import add, cast, multiply
from streamconv.tensors.concatenation import concat, index_select, reshape, stack, unsqueeze
from streamconv.tensors.constants import filled, literal
from streamconv.tensors.evaluation import Evaluator, read_bytes
from streamconv.tensors.expressions import Expression, Read, Record
from streamconv.tensors.info import DTYPES, DtypeCode, TensorInfo, contiguous_strides
from tests.support import run_python

BYTES = 12_288
DATA = [random.Random(seed).randbytes(BYTES) for seed in range(2)]
FLOATS: list[DtypeCode] = [dtype.code for dtype in DTYPES.values() if dtype.is_weight]  # type: ignore[misc]
CODES: list[DtypeCode] = [code for code, dtype in DTYPES.items() if hasattr(torch, dtype.torch)]  # type: ignore[misc]
LAW = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=int(os.environ.get("STREAMCONV_EXAMPLES", "100")),
)
Pair = tuple[Expression, torch.Tensor]


def torch_dtype(code: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, DTYPES[code].torch)
    return found


def data_of(code: str, number: int) -> bytes:
    return bytes(byte & 1 for byte in DATA[number]) if code == "BOOL" else DATA[number]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Source"]:
    path = tmp_path_factory.mktemp("source") / "x"
    path.write_bytes(DATA[0] + data_of("BOOL", 0))
    file = LocalFile(path)
    yield Source(file)
    file.close()


class Source:
    """Two records of each dtype: one in a local file, and one in another kind of file, which is copied if need be."""

    def __init__(self, file: LocalFile):
        self.reader = Reader([file])
        self._file = file

    def record(self, code: str, number: int) -> Record:
        if number:
            return Record(inline_ref(data_of(code, 1)), "inline", ByteRange(0, BYTES))
        start = BYTES if code == "BOOL" else 0
        return Record(self._file.ref, f"local {start}", ByteRange(start, BYTES))


SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


class Draw:
    """Draws compositions, as expressions and as tensors of torch."""

    def __init__(self, data: st.DataObject, source: Source):
        self._data, self._source = data, source

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def one_of(self, *choices: str) -> str:
        return self._data.draw(st.sampled_from(choices))

    def leaf(self, code: DtypeCode, shape: tuple[int, ...]) -> Pair:
        """Draw a read whose elements may overlap, or a constant."""
        dtype, itemsize = torch_dtype(code), DTYPES[code].itemsize
        kind = self.one_of("contiguous", "permuted", "strided", *(["filled", "literal"] if code in FLOATS else []))
        if kind == "filled":
            value = self._data.draw(st.sampled_from([0.0, -0.0, 1.0, 0.1, -3.3e-5, 60_000.0]))
            return filled(value, TensorInfo(code, shape)), torch.full(shape, value, dtype=dtype)
        if kind == "literal":
            values = [self._data.draw(st.floats(-60_000, 60_000)) for _ in range(3)] * math.prod(shape)
            values = values[: math.prod(shape)]
            return literal(values, code, shape), torch.tensor(values, dtype=dtype).reshape(shape)
        strides = contiguous_strides(shape)
        if kind == "permuted":
            order = self._data.draw(st.permutations(range(len(shape))))
            inner = contiguous_strides(tuple(shape[dim] for dim in order))
            strides = tuple(inner[order.index(dim)] for dim in range(len(shape)))
        elif kind == "strided":
            strides = tuple(self.integer(0, 12) for _ in shape)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        offset, number = self.integer(0, BYTES // itemsize - span), self.integer(0, 1)
        read = Read(TensorInfo(code, shape), self._source.record(code, number), offset * itemsize, strides)
        stored = torch.frombuffer(bytearray(data_of(code, number)), dtype=dtype)
        return read, torch.as_strided(stored, shape, strides, offset)

    def shape_of(self, count: int) -> tuple[int, ...]:
        """Draw a shape of ``count`` elements."""
        shape = []
        while count > 1 and len(shape) < 4:
            size = self._data.draw(st.sampled_from([n for n in range(2, count + 1) if count % n == 0]))
            shape.append(size)
            count //= size
        shape += [count] * (count > 1)
        for _ in range(self.integer(0, 1)):
            shape.insert(self.integer(0, len(shape)), 1)
        return tuple(shape)

    def composition(self, code: DtypeCode, depth: int = 5) -> Pair:
        pair = self.leaf(code, self._data.draw(SHAPES))
        for _ in range(self.integer(0, depth)):
            pair = self.step(pair)
        return pair

    def step(self, pair: Pair) -> Pair:
        ours, theirs = pair
        code, ndim = ours.info.dtype, theirs.ndim
        is_small = 0 < theirs.numel() <= 400
        choices = ["reshape", "unsqueeze"]
        choices += ["permute", "transpose", "narrow", "chunk", "split", "index_select"] if ndim else []
        choices += ["cat"] if ndim and is_small else []
        choices += ["stack"] if is_small and ndim < 5 else []
        choices += ["cast", "multiply", "add"] if code in FLOATS and is_small else []
        match self.one_of(*choices):
            case "reshape":
                shape = self.shape_of(theirs.numel()) if theirs.numel() else (0, 3)
                return reshape(ours, shape), theirs.reshape(shape)
            case "unsqueeze":
                dim = self.integer(0, ndim)
                return (unsqueeze(ours, dim), theirs.unsqueeze(dim)) if ndim < 5 else pair
            case "permute":
                dims = self._data.draw(st.permutations(range(ndim)))
                return ours.permute(dims), theirs.permute(dims)
            case "transpose":
                dims = self.integer(0, ndim - 1), self.integer(0, ndim - 1)
                return ours.transpose(*dims), theirs.transpose(*dims)
            case "narrow":
                dim = self.integer(0, ndim - 1)
                start = self.integer(0, theirs.shape[dim])
                length = self.integer(min(1, theirs.shape[dim] - start), theirs.shape[dim] - start)
                return ours.narrow(dim, start, length), theirs.narrow(dim, start, length)
            case "chunk":
                dim, other = self.integer(0, ndim - 1), self.integer(0, ndim - 1)
                counts = [n for n in range(1, theirs.shape[dim] + 1) if theirs.shape[dim] % n == 0]
                if not counts:
                    return pair
                count = self._data.draw(st.sampled_from(counts))
                return concat(ours.chunk(count, dim), other), torch.cat(theirs.chunk(count, dim), other)
            case "split":
                dim = self.integer(0, ndim - 1)
                first = self.integer(0, theirs.shape[dim])
                sizes = [first, theirs.shape[dim] - first]
                return concat(ours.split(sizes, dim)[::-1], dim), torch.cat(theirs.split(sizes, dim)[::-1], dim)
            case "index_select":
                dim = self.integer(0, ndim - 1)
                size = theirs.shape[dim]
                indexes = self._data.draw(st.lists(st.integers(0, size - 1), max_size=2 * size)) if size else []
                return index_select(ours, dim, indexes), theirs.index_select(
                    dim, torch.tensor(indexes, dtype=torch.long)
                )
            case "cat":
                dim, (other, tensor) = self.integer(0, ndim - 1), self.leaf(code, tuple(theirs.shape))
                return concat([ours, other], dim), torch.cat([theirs, tensor], dim)
            case "stack":
                dim, (other, tensor) = self.integer(0, ndim), self.leaf(code, tuple(theirs.shape))
                return stack([other, ours, other], dim), torch.stack([tensor, theirs, tensor], dim)
            case "cast":
                target: DtypeCode = self._data.draw(st.sampled_from(FLOATS))
                return cast(ours, target), theirs.to(torch_dtype(target))
            case "multiply":
                other, tensor = self.leaf(code, tuple(theirs.shape))
                return multiply(ours, other), theirs * tensor
            case _:
                other, tensor = self.leaf(code, tuple(theirs.shape))
                return add(ours, other), theirs + tensor

    def limits(self) -> dict[Any, dict[str, int]]:
        """Draw limits, by module, that are so small that every way to read a tensor is taken."""
        piece = self.integer(8, 100)
        return {
            tiles: {
                "PIECE_BYTES": piece,
                "MAX_TILE_BYTES": self.integer(256, 4000),
                "_CACHE_BYTES": self.integer(0, 4000),
                "_RUN_BYTES": self.integer(0, 200),
                "_TILE_BYTES": self.integer(0, 1000),
            },
            runs: {"_DENSE_BYTES": self.integer(0, 1000), "_GAP_BYTES": self.integer(0, 100)},
            gather: {"_BLOCK": self.integer(1, 5)},
            evaluation: {"PIECE_BYTES": piece, "COPIES_BYTES": self.integer(0, 1) * BYTES},
        }


@contextmanager
def limited(limits: dict[Any, dict[str, int]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, values in limits.items():
            stack.enter_context(patch.multiple(module, **values))
        runs.runs_of.cache_clear()
        yield
    runs.runs_of.cache_clear()


def bits_of(tensor: torch.Tensor) -> bytes:
    copied = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return copied.view(torch.uint8).numpy().tobytes()


def comparable_bits(tensor: torch.Tensor, *, is_copied: bool) -> bytes:
    """Return all bits; if values are computed, NaNs may have other payloads and become one number."""
    return bits_of(tensor if is_copied else tensor.nan_to_num(7.0, math.inf, -math.inf))


def evaluated(tensor: Expression, reader: Reader) -> bytes:
    """Evaluate a tensor as the writer does; check the sizes of parts and of buffers on the way."""
    done = bytearray()
    with Evaluator(reader, RecordChecks(reader)) as evaluator:
        for part in tiles.parts(tensor):
            size = part.values.info.nbytes
            assert 0 < size <= tiles.PIECE_BYTES
            buffer = bytearray(size)
            evaluator.evaluate("x", part, memoryview(buffer))
            done += buffer
            assert len(evaluator._source) <= tiles.MAX_TILE_BYTES
    return bytes(done)


@LAW
@given(st.data(), st.sampled_from(CODES))
def test_composition_of_any_dtype_equals_torch(source: Source, data: st.DataObject, code: DtypeCode) -> None:
    draw = Draw(data, source)
    ours, theirs = draw.composition(code)
    with limited(draw.limits()):
        have = evaluated(ours, source.reader)
    assert ours.info.shape == tuple(theirs.shape)
    assert torch_dtype(ours.info.dtype) == theirs.dtype
    is_copied = ours.is_copied or not have
    made = torch.frombuffer(bytearray(have), dtype=theirs.dtype).reshape(theirs.shape) if have else theirs
    assert len(have) == theirs.nbytes
    assert comparable_bits(made, is_copied=is_copied) == comparable_bits(theirs, is_copied=is_copied)


@pytest.mark.parametrize("code", FLOATS)
def test_constants_are_rounded_like_torchs(source: Source, code: DtypeCode) -> None:
    values = [0.1, -0.1, 1 / 3, 1e-7, 1.00390625, 1.01171875, math.inf, 0.0, -0.0]  # two are ties
    dtype = torch_dtype(code)
    assert read_bytes(literal(values, code, (9,))) == bits_of(torch.tensor(values, dtype=dtype))
    for value in values[:4]:
        assert read_bytes(filled(value, TensorInfo(code, (3,)))) == bits_of(torch.full((3,), value, dtype=dtype))


@pytest.mark.parametrize("is_first", [True, False])
def test_tile_is_never_larger_than_its_limit(source: Source, monkeypatch: pytest.MonkeyPatch, is_first: bool) -> None:
    """A product reads two tensors; every other number is read with gaps; later rows may take more than the first."""
    plain = Read(TensorInfo("F32", (16, 16)), source.record("F32", 0), 0, (16, 1))
    gaps = Read(TensorInfo("F32", (16, 16)), source.record("F32", 0), 0, (112, 3))
    large = Read(TensorInfo("F32", (1, 16, 16)), source.record("F32", 0), 0, (0, 16, 5))
    limit = 512
    monkeypatch.setattr(tiles, "MAX_TILE_BYTES", limit)
    rows = [unsqueeze(plain, 0), large]
    for tensor in (multiply(plain.transpose(0, 1), plain), gaps, concat(rows if is_first else rows[::-1])):
        for part in tiles.parts(tensor):
            assert sum(block.runs.held_bytes for block in part.blocks) <= limit


@LAW
@given(st.data(), st.sampled_from(CODES))
def test_composition_is_data_that_can_be_sent_and_moved(source: Source, data: st.DataObject, code: DtypeCode) -> None:
    ours, _ = Draw(data, source).composition(code)
    sent = pickle.loads(pickle.dumps(ours))
    assert sent == ours
    assert sent.fingerprint == ours.fingerprint
    assert ours.map_leaves(lambda read: read) == ours
    moved = ours.map_leaves(lambda read: replace(read, record=replace(read.record, name=f"moved {read.record.name}")))
    assert moved.info == ours.info
    assert moved.fingerprint != ours.fingerprint
    assert all(leaf.record.name.startswith("moved ") for leaf in moved.leaves())


def test_fingerprint_differs_if_values_come_from_elsewhere(source: Source) -> None:
    def rows(start: int, count: int, number: int = 0) -> Expression:
        return Read(TensorInfo("F32", (count, 4)), source.record("F32", number), 16 * start, (4, 1))

    square, info = rows(0, 4), TensorInfo("F32", (4, 4))
    different = [
        square,
        rows(1, 4),
        rows(0, 4, number=1),
        square.transpose(0, 1),
        concat([rows(0, 2), rows(9, 2)]),
        concat([rows(9, 2), rows(0, 2)]),
        concat([rows(0, 1), rows(9, 3)]),
        concat([rows(0, 4).narrow(1, 0, 2), rows(9, 4).narrow(1, 2, 2)], 1),
        concat([rows(0, 4).narrow(1, 0, 1), rows(9, 4).narrow(1, 2, 3)], 1),
        multiply(square, rows(1, 4)),
        multiply(square, rows(2, 4)),
        add(square, rows(2, 4)),
        multiply(cast(cast(square, "F16"), "F32"), rows(2, 4)),
        multiply(cast(cast(square, "BF16"), "F32"), rows(2, 4)),
        *(filled(value, info) for value in (0.0, -0.0, 1.0, 0.1234567, 0.1234568)),
    ]
    assert len({tensor.fingerprint for tensor in different}) == len(different)


@pytest.mark.parametrize("is_multiplied", [False, True])
def test_values_that_casts_make_infinite_are_counted(source: Source, is_multiplied: bool) -> None:
    stored = torch.frombuffer(bytearray(DATA[0]), dtype=torch.float32)[:1000]
    wanted = (stored.to(torch.float16).isinf() & stored.isfinite()).sum()
    read = Read(TensorInfo("F32", (100, 10)), source.record("F32", 0), 0, (1, 100))
    ours = stack([cast(read, "F16"), filled(1.0, TensorInfo("F16", (100, 10)))], 1)
    ours = multiply(ours, filled(1.0, ours.info)) if is_multiplied else ours
    with Evaluator(source.reader, RecordChecks(source.reader)) as evaluator:
        each = [evaluator.evaluate("x", part, memoryview(bytearray(4000))) for part in tiles.parts(ours)]
    assert 300 < sum(each) == wanted


def test_expressions_contiguous_reads_and_constants_need_no_numpy() -> None:
    imported = run_python(
        "import pickle, sys\n"
        "from streamconv.tensors.evaluation import read_bytes\n"
        "from streamconv.tensors.computed import *\n"
        "from streamconv.tensors.constants import *\n"
        "from streamconv.tensors.concatenation import *\n"
        "from streamconv.tensors.expressions import *\n"
        "from streamconv.tensors.info import TensorInfo\n"
        "from streamconv.tensors.packages import check_packages\n"
        "ones, values = filled(1.0, TensorInfo('F32', (8, 4))), literal([float(i) for i in range(32)], 'F32', (8, 4))\n"
        "rows = concat([reshape(ones.transpose(0, 1), (8, 4)), values.narrow(0, 2, 6), ones.narrow(0, 1, 1)])\n"
        "sys.modules['numpy'] = None\n"
        "check_packages({'rows': rows})\n"
        "assert read_bytes(rows)[127:129] == bytes([63, 0]), read_bytes(rows)\n"
        "tensor = stack([cast(rows, 'F16'), cast(rows, 'F16')], 2).transpose(0, 1)\n"
        "tensor = multiply(tensor, add(tensor, tensor))\n"
        "assert pickle.loads(pickle.dumps(tensor)) == tensor\n"
        "print(sorted({'torch', 'ml_dtypes'} & sys.modules.keys()))"
    )
    assert imported.strip() == "[]"


def test_tensors_that_take_numpy_are_refused_without_it(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    read = Read(TensorInfo("F32", (8, 4)), source.record("F32", 0), 0, (4, 1))
    for tensor, wanted in {
        read.transpose(0, 1): "Putting the values of x in order needs numpy, ",
        concat([read, read], 1): "Putting the values of x in order needs numpy, ",
        concat([read, reshape(read.transpose(0, 1), (8, 4))]): "Putting the values of x in order needs numpy, ",
        multiply(read, read): "Computing the values of x needs numpy and ml_dtypes, ",
        cast(read, "BF16"): "Casting needs numpy and ml_dtypes, ",
    }.items():
        with pytest.raises(UsageError) as caught:
            packages.check_packages({"x": tensor})
        assert str(caught.value).startswith(wanted)
