"""Tensors whose values are known without a source: each is a read of a file whose URL contains its bytes."""

import math
import struct
from collections.abc import Sequence
from functools import cache
from hashlib import sha256

from streamconv.files.base import ByteRange
from streamconv.files.inline import inline_ref
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import DtypeCode, TensorInfo, contiguous_strides
from streamconv.tensors.shapes import Shape


def placeholder(info: TensorInfo) -> Read:
    """Return a tensor of this dtype and shape without real values, to find out what operations make of its shape."""
    return Read(info, _zeros(info.itemsize), 0, (0,) * len(info.shape))


@cache  # tens of thousands of names may need placeholders
def _zeros(size: int) -> Record:
    return Record(inline_ref(bytes(size)), "placeholder", ByteRange(0, size))


def filled(value: float, info: TensorInfo) -> Read:
    """Return a tensor whose elements are all ``value``, like torch.full. It must have a floating-point dtype."""
    short = f"{value:g}"
    name = short if float(short) == value else repr(value)
    record = Record(inline_ref(_packed(value, info.dtype)), name, ByteRange(0, info.itemsize))
    return Read(info, record, 0, (0,) * len(info.shape))


def literal(values: Sequence[float], dtype: DtypeCode, shape: Shape) -> Read:
    """Return a small tensor of these values, in row-major order. It must have a floating-point dtype.

    Raises:
        ValueError: the shape has another number of elements.
    """
    info = TensorInfo(dtype, shape)
    if len(values) != math.prod(shape):
        raise ValueError(f"{info} cannot hold {len(values)} values")
    data = b"".join(_packed(value, dtype) for value in values)
    record = Record(inline_ref(data), f"values {sha256(data).hexdigest()}", ByteRange(0, len(data)))
    return Read(info, record, 0, contiguous_strides(shape))


def _packed(value: float, dtype: DtypeCode) -> bytes:
    """Return the bytes of a number; it is rounded to float32 before it is rounded to a 16-bit dtype."""
    if dtype == "F64":
        return struct.pack("<d", value)
    single = struct.pack("<f", value)
    if dtype == "F16":
        return struct.pack("<e", *struct.unpack("<f", single))
    if dtype == "BF16":
        (bits,) = struct.unpack("<I", single)
        return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return single
