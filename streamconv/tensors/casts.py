"""Floating-point bytes in another precision, bit for bit as torch's ``.to()`` makes them on a CPU.

All goes by way of float32, as torch's conversions do. What bits torch gives to NaNs depends on the CPU and,
at the end of a tensor, on how it was cut up: here they are those of AVX2 and AVX-512, within a tensor. numpy,
which knows no bfloat16, is imported by the first cast: a conversion without one does not pay for it.
"""

from functools import cache
from threading import get_ident
from typing import TYPE_CHECKING, Any

from streamconv.tensors.info import DTYPES

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_AT_ONCE = 32 << 10  # elements: what is made of them on the way stays in a CPU's cache
_INFINITIES = {"F16": 0x7C00, "BF16": 0x7F80}


def cast_into(data: memoryview, dtype: str, out: memoryview, target: str) -> int:
    """Write the elements of ``data`` into ``out`` in another precision.

    ``dtype`` and ``target`` are safetensors' codes.

    Returns:
        How many of them were finite and became infinite.
    """
    import numpy as np

    values, results = np.frombuffer(data, DTYPES[dtype].numpy), np.frombuffer(out, DTYPES[target].numpy)
    overflow_count = 0
    with np.errstate(all="ignore"):
        for at in range(0, len(values), _AT_ONCE):
            part, result = values[at : at + _AT_ONCE], results[at : at + _AT_ONCE]
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
    """What is made on the way, for one thread: to ask the system for it anew would take longer than all else."""
    import numpy as np

    return np.empty((3, _AT_ONCE), "<u4")


def _to_float32(values: "Array", dtype: str) -> "Array":
    import numpy as np

    if dtype == "BF16":
        bits = values.astype("<u4")
        bits <<= 16
        return bits.view("<f4")
    single = values.astype("<f4", copy=False)
    if dtype == "F16" and (nans := np.isnan(single)).any():
        single.view("<u4")[nans] |= 0x00400000  # a quiet one, as a CPU's own instruction makes it
    return single


def _round_to_float16(single: "Array", result: "Array") -> None:
    """To nearest, ties to even. A NaN keeps its sign and its highest bits, and is a quiet one.

    A float32's own addition rounds: a power of two is added that is 2^13 times what the last bit of the float16
    will stand for, so that the sum's last bits are the float16's. numpy's conversion takes twice as long.
    """
    import numpy as np

    bits, (sums, power, rounded) = single.view("<u4"), _scratch(get_ident())[:, : len(single)]
    size = sums.view("<f4")
    np.abs(single, out=size)
    size *= np.float32(2.0**112)  # what float16 cannot hold is infinite from here on
    size *= np.float32(2.0**-110)
    np.bitwise_and(bits, 0x7F800000, out=power)
    np.maximum(power, 0x38800000, out=power)  # 2^-14: below it a float16's last bit stands for the same
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
    """The upper half of a float32, to nearest, ties to even. All NaNs become one."""
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
