"""Converts floating-point values to another precision, like torch's ``.to()`` on a CPU.

All results but NaNs have the same bits. A NaN stays a NaN with its sign; its payload in torch depends on the CPU.

numpy converts, with bfloat16 from ml_dtypes: on 2 cores of an AMD EPYC it is 1.2 to 1.7 times as fast as integer
operations were. Only the rounding to float16 is our own, because numpy's takes 1.4 times as long (``python -m
benchmarks.casts``; numbers in benchmarks/casts.md). numpy and ml_dtypes are imported by the first cast that needs them.
"""

import threading
from typing import TYPE_CHECKING, Any

from streamconv.tensors.info import DTYPES

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK_ELEMENTS = 32 << 10  # so that intermediate values stay in the CPU's cache
_INFINITIES = {"F16": 0x7C00, "BF16": 0x7F80}
_of_thread = threading.local()


def cast_into(data: memoryview, dtype: str, out: memoryview, target: str) -> int:
    """Convert the elements of ``data`` to another precision and write them into ``out``.

    Args:
        data: Elements of the type ``dtype``, a safetensors code.
        out: As many elements of the type ``target``, a safetensors code.

    Returns:
        The number of finite elements that became infinite.
    """
    import numpy as np

    if "BF16" in (dtype, target):
        import ml_dtypes  # noqa: F401  # adds the dtype bfloat16 to numpy

    values, results = np.frombuffer(data, DTYPES[dtype].numpy), np.frombuffer(out, DTYPES[target].numpy)
    overflow_count = 0
    with np.errstate(all="ignore"):
        for at in range(0, len(values), _BLOCK_ELEMENTS):
            part, result = values[at : at + _BLOCK_ELEMENTS], results[at : at + _BLOCK_ELEMENTS]
            if target == "F16":
                _round_to_float16(part.astype("<f4", copy=False), result)
            else:  # torch rounds float64 to float32 first
                result[:] = part.astype("<f4") if dtype == "F64" else part
            infinite = _count_infinite(result, target)
            overflow_count += infinite and infinite - _count_infinite(part, dtype)
    return overflow_count


def _scratch() -> "Array":
    """Return this thread's memory for intermediate values. Allocating it for each call would take a third more time."""
    import numpy as np

    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = np.empty((2, _BLOCK_ELEMENTS), "<f4")
    scratch: Array = _of_thread.scratch
    return scratch


def _round_to_float16(single: "Array", result: "Array") -> None:
    """Round to nearest, ties to even. A NaN keeps its sign and loses its payload.

    The rounding is done by a float32 addition: adding 2^13 times the value's own power of two leaves the bits of the
    float16 at the end of the sum.
    """
    import numpy as np

    size, power = _scratch()[:, : len(single)]
    bits, size_bits, power_bits = single.view("<u4"), size.view("<u4"), power.view("<u4")
    np.abs(single, out=size)
    size *= np.float32(2.0**112)  # values too large for float16 become infinite here
    size *= np.float32(2.0**-110)
    np.bitwise_and(bits, 0x7F800000, out=power_bits)
    np.maximum(power_bits, 0x38800000, out=power_bits)  # 2^-14: below it, the value of a float16's last bit is constant
    power_bits += 0x07800000
    size += power
    rounded = np.right_shift(size_bits, 13, out=power_bits)
    rounded &= 0x7C00
    size_bits &= 0x0FFF
    rounded += size_bits
    if (nans := np.isnan(single)).any():
        rounded[nans] = 0x7E00
    signs = np.right_shift(bits, 16, out=size_bits)
    signs &= 0x8000
    rounded |= signs
    result.view("<u2")[:] = rounded


def _count_infinite(values: "Array", dtype: str) -> int:
    import numpy as np

    if dtype in _INFINITIES:
        return int(np.count_nonzero((values.view("<u2") & 0x7FFF) == _INFINITIES[dtype]))
    return int(np.count_nonzero(np.isinf(values)))
