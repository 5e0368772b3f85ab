"""Tensors that are not read yet: their dtype and shape, and where their bytes are.

Strides are in elements, as in ``torch._utils._rebuild_tensor_v2``, and offsets are in bytes. Everything here is pure
data; a `Reader` opens the files when bytes are read.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from streamconv.errors import SourceError
from streamconv.files.base import ByteRange, FileRef
from streamconv.files.inline import inline_ref
from streamconv.files.reader import Reader
from streamconv.tensors.info import DtypeCode, TensorInfo, contiguous_strides

# The bytes that a row of a strided tensor may span; it is read with the gaps between its elements. A piece may span a
# sixteenth more. Otherwise, each row of the largest transposed matrices would be a piece that reads the whole matrix.
MAX_SPAN_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """A byte range of a file with at most one checksum: a torch storage, or a safetensors tensor.

    ``crc32`` is None if the file has no checksum for it.
    """

    file: FileRef
    name: str
    range: ByteRange
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor in a checkpoint, not read yet. ``offset`` is in bytes from the start of the record.

    ``cast_to`` is the dtype to write; if it is empty, the stored dtype is written.
    """

    info: TensorInfo
    record: Record
    offset: int
    strides: tuple[int, ...]
    cast_to: DtypeCode | Literal[""] = ""

    @property
    def target(self) -> TensorInfo:
        """The dtype and shape that are written."""
        return TensorInfo(self.cast_to or self.info.dtype, self.info.shape)

    @property
    def is_contiguous(self) -> bool:
        """Return whether its bytes in row-major order are one range of the record."""
        dims = zip(self.info.shape, self.strides, contiguous_strides(self.info.shape), strict=True)
        return self.info.nbytes == 0 or all(n == 1 or have == want for n, have, want in dims)

    @property
    def span(self) -> int:
        """The number of bytes in the record from the first element to the last, including gaps."""
        if not self.info.nbytes:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.info.shape, self.strides, strict=True))
        return (last + 1) * self.info.itemsize

    @property
    def read_range(self) -> ByteRange:
        """The range of the file that `read_into` reads."""
        return ByteRange(self.record.range.start + self.offset, self.span)

    def rows(self, start: int, stop: int) -> "SourceTensor":
        """Return ``tensor[start:stop]`` along dim 0, without reading it."""
        return replace(
            self,
            info=TensorInfo(self.info.dtype, (stop - start, *self.info.shape[1:])),
            offset=self.offset + start * self.strides[0] * self.info.itemsize,
        )

    def split(self, max_bytes: int) -> Iterator["SourceTensor"]:
        """Yield pieces of at most ``max_bytes``, as stored and as written, in row-major order.

        A contiguous tensor is cut between any elements, a strided one between rows of any leading dimensions.

        Raises:
            SourceError: a row of a strided tensor spans more than `MAX_SPAN_BYTES` of its storage; reading that much
                for every row would take too long.
        """
        larger = max(self.info.itemsize, self.target.itemsize)
        if self.is_contiguous:
            count = math.prod(self.info.shape)
            flat = replace(self, info=TensorInfo(self.info.dtype, (count,)), strides=(1,))
            step = max(1, max_bytes // larger)
            yield from (flat.rows(i, min(i + step, count)) for i in range(0, count, step))
            return
        row = self._row
        if row.span > MAX_SPAN_BYTES:
            raise SourceError(
                f"{self.record.file.name}: the tensor {self.info} in {self.record.name} has strides "
                f"{list(self.strides)}, so that one row spans {row.span:,} bytes; it cannot be streamed. "
                "Save it again after tensor.contiguous()."
            )
        pitch = self.strides[0] * self.info.itemsize
        step = self._rows_at_once(row, max_bytes)
        if not step:
            for i in range(self.info.shape[0]):
                yield from replace(row, offset=self.offset + i * pitch).split(max_bytes)
            return
        count = self.info.shape[0]
        yield from (self.rows(i, min(i + step, count)) for i in range(0, count, step))

    def bytes_read(self, max_bytes: int) -> int:
        """Return how many bytes all pieces of `split` read together, gaps between elements included."""
        if self.is_contiguous:
            return self.info.nbytes
        row, count = self._row, self.info.shape[0]
        step = self._rows_at_once(row, max_bytes)
        if not step:
            return count * row.bytes_read(max_bytes)
        pieces, rest = divmod(count, step)
        return pieces * self.rows(0, step).span + self.rows(0, rest).span

    @property
    def _row(self) -> "SourceTensor":
        """The first row along dim 0."""
        return replace(self, info=TensorInfo(self.info.dtype, self.info.shape[1:]), strides=self.strides[1:])

    def _rows_at_once(self, row: "SourceTensor", max_bytes: int) -> int:
        """Return how many rows a piece may have, 0 if a single one must be cut itself. ``row`` is any of them."""
        row_bytes = math.prod(row.info.shape) * max(self.info.itemsize, self.target.itemsize)
        step, pitch = max_bytes // row_bytes, self.strides[0] * self.info.itemsize
        max_span = MAX_SPAN_BYTES + MAX_SPAN_BYTES // 16
        return min(step, 1 + (max_span - row.span) // pitch) if pitch else step

    def read_into(self, buffer: memoryview, reader: Reader) -> memoryview:
        """Read the tensor into ``buffer``, which has ``info.nbytes`` bytes, in row-major order and without a cast.

        Returns:
            The bytes of `read_range` as they are in the file; for a contiguous tensor, that is ``buffer`` itself.
        """
        start = self.read_range.start
        if self.is_contiguous:
            if buffer.nbytes:
                reader.open(self.record.file).read_at(start, buffer)
            return buffer
        memory = memoryview(bytearray(self.span))
        reader.open(self.record.file).read_at(start, memory)
        _gather(memory, self.info, self.strides, buffer)
        return memory

    def tobytes(self, reader: Reader | None = None) -> bytes:
        """Read the whole tensor into memory, in row-major order and without a cast.

        Without a ``reader``, the file is opened for this call only.
        """
        if reader is None:
            with Reader() as own:
                return self.tobytes(own)
        data = bytearray(self.info.nbytes)
        view, at = memoryview(data), 0
        for piece in self.split(MAX_SPAN_BYTES):
            piece.read_into(view[at : at + piece.info.nbytes], reader)
            at += piece.info.nbytes
        return bytes(data)


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor that consists of ``parts`` of the same shape, concatenated along dim 0."""

    info: TensorInfo
    parts: tuple[SourceTensor, ...]

    @property
    def target(self) -> TensorInfo:
        """See `SourceTensor.target`."""
        return TensorInfo(self.parts[0].target.dtype, self.info.shape)

    def rows(self, start: int, stop: int) -> SourceTensor:
        """Return the part that consists of exactly these rows.

        Raises:
            ValueError: no part consists of these rows.
        """
        size = self.info.shape[0] // len(self.parts)
        if start % size or stop - start != size:
            raise ValueError(f"rows {start} to {stop} are not one part of {self.info}, whose parts have {size} rows")
        return self.parts[start // size]

    def split(self, max_bytes: int) -> Iterator[SourceTensor]:
        """See `SourceTensor.split`."""
        for part in self.parts:
            yield from part.split(max_bytes)


AnyTensor = SourceTensor | Joined


def parts_of(tensor: AnyTensor) -> tuple[SourceTensor, ...]:
    return tensor.parts if isinstance(tensor, Joined) else (tensor,)


def joined(parts: Sequence[SourceTensor]) -> AnyTensor:
    """Concatenate tensors of the same shape along dim 0. A single one is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    dtype, (rows, *rest) = parts[0].info.dtype, parts[0].info.shape
    return Joined(TensorInfo(dtype, (rows * len(parts), *rest)), tuple(parts))


def prefetch(tensors: Iterable[SourceTensor], reader: Reader) -> None:
    """Announce to each file that these tensors will be read, in this order."""
    ranges: dict[FileRef, list[ByteRange]] = {}
    for tensor in tensors:
        ranges.setdefault(tensor.record.file, []).append(tensor.read_range)
    for file, wanted in ranges.items():
        reader.open(file).prefetch(wanted)


def filled(value: float, info: TensorInfo) -> SourceTensor:
    """Return a tensor whose elements are all ``value``. It must have a floating-point dtype."""
    single = struct.pack("<f", value)
    data = {"F64": struct.pack("<d", value), "F32": single, "F16": struct.pack("<e", value), "BF16": single[2:]}
    record = Record(inline_ref(data[info.dtype]), f"{value:g}", ByteRange(0, info.itemsize))
    return SourceTensor(info, record, 0, (0,) * len(info.shape))


def _gather(memory: memoryview, info: TensorInfo, strides: tuple[int, ...], out: memoryview) -> None:
    """Copy a strided tensor from ``memory`` to ``out``, one run of the innermost dimension at a time.

    Elements are copied as unsigned integers of their size, so that their bits do not change. A memoryview cannot be
    sliced with step 0, so the elements of an expanded innermost dimension are copied one by one.
    """
    codes: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
    code = codes[info.itemsize]
    source, target = memory.cast(code), out.cast(code)
    *outer, run = info.shape
    *outer_strides, step = strides
    for row, index in enumerate(product(*map(range, outer))):
        first = sum(i * s for i, s in zip(index, outer_strides, strict=True))
        if step:
            target[row * run : (row + 1) * run] = source[first : first + (run - 1) * step + 1 : step]
        else:
            for i in range(run):
                target[row * run + i] = source[first]
