"""A tensor before anyone reads it: what it is, and where its bytes lie.

Strides are in elements and offsets in bytes, as ``torch._utils._rebuild_tensor_v2`` and the zip
record have them. Everything here is pure data: a `Reader` opens the files when bytes are read.
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
from streamconv.tensors.info import TensorInfo, contiguous_strides

# A strided tensor is gathered from memory; this bounds what a piece of it may span.
MAX_SPAN_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """A stretch of a file that is checked as one: a torch storage, or a safetensors tensor.

    ``crc32`` is None where the file carries no checksum for it.
    """

    file: FileRef
    name: str
    range: ByteRange
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor in a checkpoint, unread. ``offset`` is in bytes from the record's start.

    ``cast_to`` is the dtype in which it will be written; an empty one means as it is stored.
    """

    info: TensorInfo
    record: Record
    offset: int
    strides: tuple[int, ...]
    cast_to: str = ""

    @property
    def target(self) -> TensorInfo:
        """What is written of it."""
        return TensorInfo(self.cast_to or self.info.dtype, self.info.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its bytes in row-major order are one range of the record."""
        dims = zip(self.info.shape, self.strides, contiguous_strides(self.info.shape), strict=True)
        return self.info.nbytes == 0 or all(n == 1 or have == want for n, have, want in dims)

    @property
    def span(self) -> int:
        """Bytes from the first element to behind the last one, as they lie in the record."""
        if not self.info.nbytes:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.info.shape, self.strides, strict=True))
        return (last + 1) * self.info.itemsize

    @property
    def read_range(self) -> ByteRange:
        """What `read_into` reads of the file."""
        return ByteRange(self.record.range.start + self.offset, self.span)

    def rows(self, start: int, stop: int) -> "SourceTensor":
        """``tensor[start:stop]`` along dim 0, still unread."""
        return replace(
            self,
            info=TensorInfo(self.info.dtype, (stop - start, *self.info.shape[1:])),
            offset=self.offset + start * self.strides[0] * self.info.itemsize,
        )

    def split(self, max_bytes: int) -> Iterator["SourceTensor"]:
        """Pieces of at most ``max_bytes``, read or written, that make up the row-major bytes, in order.

        A contiguous tensor is cut anywhere, a strided one between rows of whatever depth is needed.

        Raises:
            SourceError: a row of a strided tensor spans more than `MAX_SPAN_BYTES` of its storage;
                reading that for every row would take forever.
        """
        larger = max(self.info.itemsize, self.target.itemsize)
        if self.is_contiguous:
            count = math.prod(self.info.shape)
            flat = replace(self, info=TensorInfo(self.info.dtype, (count,)), strides=(1,))
            step = max(1, max_bytes // larger)
            yield from (flat.rows(i, min(i + step, count)) for i in range(0, count, step))
            return
        row = replace(self, info=TensorInfo(self.info.dtype, self.info.shape[1:]), strides=self.strides[1:])
        if row.span > MAX_SPAN_BYTES:
            raise SourceError(
                f"{self.record.file.name}: the tensor {self.info} in {self.record.name} has strides "
                f"{list(self.strides)}, so that one row spans {row.span:,} bytes; it cannot be streamed. "
                "Save it again after tensor.contiguous()."
            )
        count, pitch = self.info.shape[0], self.strides[0] * self.info.itemsize
        row_bytes = math.prod(row.info.shape) * larger
        if row_bytes > max_bytes:
            for i in range(count):
                yield from replace(row, offset=self.offset + i * pitch).split(max_bytes)
            return
        step = max_bytes // row_bytes
        if pitch:
            step = min(step, 1 + (MAX_SPAN_BYTES - row.span) // pitch)
        yield from (self.rows(i, min(i + step, count)) for i in range(0, count, step))

    def read_into(self, buffer: memoryview, reader: Reader) -> memoryview:
        """Write the row-major bytes, as they are stored, into ``buffer``, which is ``info.nbytes`` long.

        Returns:
            The bytes of `read_range` as they are in the file: of a contiguous tensor, ``buffer`` itself.
        """
        where = self.read_range
        if self.is_contiguous:
            if buffer.nbytes:
                reader.open(self.record.file).read_at(where.start, buffer)
            return buffer
        memory = memoryview(bytearray(where.length))
        reader.open(self.record.file).read_at(where.start, memory)
        _gather(memory, self.info, self.strides, buffer)
        return memory

    def tobytes(self, reader: Reader | None = None) -> bytes:
        """Read the row-major bytes, as they are stored, all of them into memory.

        Without a ``reader``, the file is opened for as long as this takes.
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
    """A tensor that is made up of ``parts`` of one shape, one after another along dim 0."""

    info: TensorInfo
    parts: tuple[SourceTensor, ...]

    @property
    def target(self) -> TensorInfo:
        """As `SourceTensor.target`."""
        return TensorInfo(self.parts[0].target.dtype, self.info.shape)

    def rows(self, start: int, stop: int) -> SourceTensor:
        """The part that has these rows, and no others."""
        size = self.info.shape[0] // len(self.parts)
        if start % size or stop - start != size:
            raise ValueError(f"rows {start} to {stop} are no part of {self.info}, whose parts have {size}")
        return self.parts[start // size]

    def split(self, max_bytes: int) -> Iterator[SourceTensor]:
        """As `SourceTensor.split`."""
        for part in self.parts:
            yield from part.split(max_bytes)


AnyTensor = SourceTensor | Joined


def parts_of(tensor: AnyTensor) -> tuple[SourceTensor, ...]:
    return tensor.parts if isinstance(tensor, Joined) else (tensor,)


def joined(parts: Sequence[SourceTensor]) -> AnyTensor:
    """``parts`` of one shape as one tensor; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    dtype, (rows, *others) = parts[0].info.dtype, parts[0].info.shape
    return Joined(TensorInfo(dtype, (rows * len(parts), *others)), tuple(parts))


def prefetch(tensors: Iterable[SourceTensor], reader: Reader) -> None:
    """Announce to each file that these tensors will be read, in this order."""
    ranges: dict[FileRef, list[ByteRange]] = {}
    for tensor in tensors:
        ranges.setdefault(tensor.record.file, []).append(tensor.read_range)
    for file, wanted in ranges.items():
        reader.open(file).prefetch(wanted)


def filled(value: float, info: TensorInfo) -> SourceTensor:
    """A tensor of ``value`` throughout, for what no checkpoint holds. ``info``'s dtype is a floating-point one."""
    single = struct.pack("<f", value)
    data = {"F64": struct.pack("<d", value), "F32": single, "F16": struct.pack("<e", value), "BF16": single[2:]}
    record = Record(inline_ref(data[info.dtype]), f"{value:g}", ByteRange(0, info.itemsize))
    return SourceTensor(info, record, 0, (0,) * len(info.shape))


def _gather(memory: memoryview, info: TensorInfo, strides: tuple[int, ...], out: memoryview) -> None:
    """Copy a strided tensor out of ``memory``, one innermost run at a time.

    A memoryview slices with a step but not with step 0, so an expanded innermost dimension is
    repeated instead. Elements are moved as unsigned integers of their size: no value is looked at.
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
