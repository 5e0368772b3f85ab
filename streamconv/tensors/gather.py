"""Puts values in order, in memory, with numpy.

Elements are copied as unsigned integers of their size, so that their bits do not change. numpy is imported by the first
call for other values than constants; contiguous reads do not need it either.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamconv.tensors.casts import cast_into
from streamconv.tensors.computed import Cast, Elementwise
from streamconv.tensors.concatenation import Concat
from streamconv.tensors.expressions import Expression, Read
from streamconv.tensors.info import DTYPES, DtypeCode, TensorInfo

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 256  # rows and columns of a transposed matrix that are copied at once, and fit into a CPU's cache


def gather(values: Expression, buffer: memoryview, source: bytearray) -> int:
    """Evaluate an expression whose leaves are in ``source`` into ``buffer``, which has its size.

    Returns:
        The number of values that became infinite.
    """
    if isinstance(values, Read) and values.is_constant:
        size = values.info.itemsize
        buffer[:] = source[values.offset : values.offset + size] * (len(buffer) // size)
        return 0
    return _Gather(source).into(values, _array(values.info, buffer))


class _Gather:
    def __init__(self, source: bytearray):
        self._source = source

    def into(self, tensor: Expression, out: "Array") -> int:
        """Evaluate a tensor into ``out``, an array of its shape; return how many values became infinite."""
        if isinstance(tensor, Read):
            _copy(self._view(tensor), out)
            return 0
        if isinstance(tensor, Concat):
            before, starts = (slice(None),) * tensor.dim, (0, *tensor.ends)
            return sum(
                self.into(part, out[(*before, slice(start, end))])
                for part, start, end in zip(tensor.parts, starts, tensor.ends, strict=False)
            )
        if isinstance(tensor, Cast):
            values, result = _array(tensor.of.info), _array(tensor.info)
            infinite = self.into(tensor.of, values)
            infinite += cast_into(_bytes(values), tensor.of.info.dtype, _bytes(result), tensor.info.dtype)
            out[...] = result
            return infinite
        if isinstance(tensor, Elementwise):
            return self._combine(tensor, out)
        raise TypeError(f"cannot evaluate a {type(tensor).__name__}")

    def _combine(self, tensor: Elementwise, out: "Array") -> int:
        """Multiply or add in float32 or, for float64, in float64, as torch does, and round once."""
        import numpy as np

        dtype: DtypeCode = "F64" if tensor.info.dtype == "F64" else "F32"
        operands, infinite = [], 0
        for each in (tensor.one, tensor.other):
            stored, wide = _array(each.info), _array(TensorInfo(dtype, each.shape))
            infinite += self.into(each, stored)
            _convert(stored, each.info.dtype, wide, dtype)
            operands.append(wide.view(DTYPES[dtype].numpy))
        with np.errstate(all="ignore"):
            combined = (np.add if tensor.operator == "add" else np.multiply)(*operands)
        result = _array(tensor.info)
        _convert(combined, dtype, result, tensor.info.dtype)
        out[...] = result
        return infinite

    def _view(self, read: Read) -> "Array":
        import numpy as np

        strides = [stride * read.info.itemsize for stride in read.strides]
        memory, offset = (self._source, read.offset) if read.info.nbytes else (None, 0)
        return np.ndarray(read.shape, _unsigned(read.info), memory, offset, strides)


def _convert(values: "Array", dtype: str, out: "Array", target: str) -> None:
    if dtype == target:
        _bytes(out)[:] = _bytes(values)
    else:
        cast_into(_bytes(values), dtype, _bytes(out), target)


def _unsigned(info: TensorInfo) -> str:
    return f"u{info.itemsize}"


def _array(info: TensorInfo, memory: memoryview | None = None) -> "Array":
    import numpy as np

    return np.ndarray(info.shape, _unsigned(info), memory)


def _bytes(array: "Array") -> memoryview:
    return array.reshape(-1).view("u1").data


def _copy(view: "Array", out: "Array") -> None:
    """Copy values; those of a transposed matrix block by block, since a whole row of it would leave the cache."""
    import numpy as np

    inner = _dim_of_neighbours(view)
    if inner is None:
        out[...] = view
        return
    out, view = np.moveaxis(out, inner, -2), np.moveaxis(view, inner, -2)
    rows, columns = view.shape[-2:]
    for i in range(0, rows, _BLOCK):
        for j in range(0, columns, _BLOCK):
            out[..., i : i + _BLOCK, j : j + _BLOCK] = view[..., i : i + _BLOCK, j : j + _BLOCK]


def _dim_of_neighbours(view: "Array") -> int | None:
    """Return the dimension along which elements are closest in memory, if it is not the last one."""
    if view.ndim < 2 or view.size < _BLOCK * _BLOCK or view.strides[-1] == view.itemsize:
        return None
    strides: Sequence[tuple[int, int]] = [
        (abs(stride), dim) for dim, (size, stride) in enumerate(zip(view.shape, view.strides, strict=True)) if size > 1
    ]
    if len(strides) < 2:
        return None
    nearest = min(strides)
    return nearest[1] if nearest[1] != strides[-1][1] and nearest[0] < strides[-1][0] else None
