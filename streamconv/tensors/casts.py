"""Converts floating-point values to another precision, bit for bit like torch's ``.to()`` on a CPU.

Every conversion goes through float32, as torch's do. The bits of a NaN in torch depend on the CPU and, at the end of
a tensor, on how the work was divided; here they are those of AVX2 and AVX-512 inside a tensor. numpy, which has no
bfloat16, is imported by the first cast, so that a conversion without casts does not pay for it.
"""

from functools import cache
from threading import get_ident
from typing import TYPE_CHECKING, Any

from streamconv.tensors.info import DTYPES

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK_ELEMENTS = 32 << 10  # so that intermediate values stay in the CPU's cache
_INFINITIES = {"F16": 0x7C00, "BF16": 0x7F80}


def cast_into(data: memoryview, dtype: str, out: memoryview, target: str) -> int:
    """Convert the elements of ``data`` to another precision and write them into ``out``.

    Args:
        data: Elements of the type ``dtype``, a safetensors code.
        out: As many elements of the type ``target``, a safetensors code.

    Returns:
        The number of finite elements that became infinite.
    """
    import numpy as np

    values, results = np.frombuffer(data, DTYPES[dtype].numpy), np.frombuffer(out, DTYPES[target].numpy)
    overflow_count = 0
    with np.errstate(all="ignore"):
        for at in range(0, len(values), _BLOCK_ELEMENTS):
            part, result = values[at : at + _BLOCK_ELEMENTS], results[at : at + _BLOCK_ELEMENTS]
            single = _to_float32(part, dtype)
            if target == "F32":
                result[:] = single
            elif target == "F16":
                _round_to_float16(single, result)
            else:
                _round_to_bfloat16(single, result, nan=0x7FC0 if dtype == "F16" else 0xFFFF)
            infinite = _count_infinite(result, target)
            overflow_count += infinite and infinite - _count_infinite(part, dtype)
    return overflow_count


@cache
def _scratch(thread: int) -> "Array":
    """Return one thread's memory for intermediate values. Allocating it for each block would dominate the time."""
    import numpy as np

    return np.empty((3, _BLOCK_ELEMENTS), "<u4")


def _to_float32(values: "Array", dtype: str) -> "Array":
    import numpy as np

    if dtype == "BF16":
        bits = values.astype("<u4")
        bits <<= 16
        return bits.view("<f4")
    single = values.astype("<f4", copy=False)
    if dtype == "F16" and (nans := np.isnan(single)).any():
        single.view("<u4")[nans] |= 0x00400000  # a quiet NaN, like the CPU's conversion instruction
    return single


def _round_to_float16(single: "Array", result: "Array") -> None:
    """Round to nearest, ties to even. A NaN becomes quiet and keeps its sign and highest bits.

    The rounding is done by a float32 addition: adding 2^13 times the value's own power of two leaves the bits of the
    float16 at the end of the sum. numpy's own conversion takes twice as long.
    """
    import numpy as np

    bits, (sums, power, rounded) = single.view("<u4"), _scratch(get_ident())[:, : len(single)]
    size = sums.view("<f4")
    np.abs(single, out=size)
    size *= np.float32(2.0**112)  # values too large for float16 become infinite here
    size *= np.float32(2.0**-110)
    np.bitwise_and(bits, 0x7F800000, out=power)
    np.maximum(power, 0x38800000, out=power)  # 2^-14: below it, the value of a float16's last bit is constant
    power += 0x07800000
    size += power.view("<f4")
    np.right_shift(sums, 13, out=rounded)
    rounded &= 0x7C00
    sums &= 0x0FFF
    rounded += sums
    np.right_shift(bits, 16, out=power)
    power &= 0x8000
    rounded |= power
    result.view("<u2")[:] = rounded
    if (nans := np.isnan(single)).any():
        bits = single.view("<u4")[nans]
        result.view("<u2")[nans] = (bits >> 16) & 0x8000 | 0x7E00 | (bits >> 13) & 0x1FF


def _round_to_bfloat16(single: "Array", result: "Array", nan: int) -> None:
    """Round to the upper half of the float32, to nearest, ties to even. All NaNs become ``nan``."""
    import numpy as np

    bits = single.view("<u4")
    rounded = _scratch(get_ident())[0, : len(single)]
    np.right_shift(bits, 16, out=rounded)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result[:] = rounded
    if (nans := np.isnan(single)).any():
        result[nans] = nan


def _count_infinite(values: "Array", dtype: str) -> int:
    import numpy as np

    if dtype in _INFINITIES:
        return int(np.count_nonzero((values.view("<u2") & 0x7FFF) == _INFINITIES[dtype]))
    return int(np.count_nonzero(np.isinf(values)))
