"""Reads the small tensors whose values, not only their shapes, decide how a checkpoint is converted."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from streamconv.families.selection import Selection
from streamconv.files.reader import Reader
from streamconv.tensors.evaluation import read_bytes
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import DTYPES, DtypeCode
from streamconv.tensors.packages import check_packages

MAX_TENSOR_BYTES = 1 << 20
MAX_BYTES = 16 << 20  # of all such tensors: a hostile file could have thousands


def read_summaries(selection: Selection, tensors: Mapping[str, Expression], reader: Reader) -> dict[str, Any]:
    """Return summaries of the values, by key; none if the family has no such tensors or the model was converted before.

    Larger tensors, and those beyond `MAX_BYTES`, are not read: the family's rules then refuse their shapes or number.

    Raises:
        SourceError: a tensor cannot be read.
        UsageError: a tensor is not stored in row-major order, and numpy is not installed.
    """
    aspect = selection.family.deciding_values
    if aspect is None or selection.is_converted:
        return {}
    summaries: dict[str, Any] = {}
    total = 0
    for key, tensor in tensors.items():
        size = tensor.info.nbytes
        is_small = size <= MAX_TENSOR_BYTES and total + size <= MAX_BYTES
        if aspect.is_read(key) and is_small and DTYPES[tensor.info.dtype].is_weight:
            total += size
            check_packages({key: tensor})
            summaries[key] = aspect.summarise(key, to_floats(read_bytes(tensor, reader), tensor.info.dtype))
    return summaries


def to_floats(data: bytes, dtype: DtypeCode) -> Sequence[float]:
    """Return the values of a floating-point tensor. Neither torch nor numpy is imported."""
    if dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return to_floats(bytes(wide), "F32")
    code = {"F64": "d", "F32": "f", "F16": "e"}[dtype]
    return struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)
