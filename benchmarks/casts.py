"""python -m benchmarks.casts [--every-float32]: numpy with ml_dtypes, our casts and torch's, compared.

Prints how many results differ from torch's, then speeds in memory on one thread. The ways take turns on one piece, as
large as the writer's pieces, and count the values that became infinite in the same way.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest.mock import patch

import ml_dtypes  # noqa: F401  # adds the dtype bfloat16 to numpy
import numpy as np
import torch

from benchmarks.measure import machine
from streamconv.tensors import casts
from streamconv.tensors.info import DTYPES
from streamconv.tensors.tiles import PIECE_BYTES

Array = np.ndarray[Any, np.dtype[Any]]
Cast = Callable[[Array, str], Array]

PAIRS = [(a, b) for a in ("F64", "F32", "F16", "BF16") for b in ("F32", "F16", "BF16") if a != b]
CODES = {np.dtype(dtype.numpy): code for code, dtype in DTYPES.items() if dtype.numpy}
TURNS, CALLS, BLOCK = 100, 5, 1 << 22


def with_streamconv(values: Array, target: str) -> Array:
    out = np.empty(len(values), DTYPES[target].numpy)
    casts.cast_into(values.view(np.uint8).data, CODES[values.dtype], out.view(np.uint8).data, target)
    return out


def with_numpy(values: Array, target: str) -> Array:
    """Cast by `cast_into`, with numpy's rounding to float16."""
    with patch.object(casts, "_round_to_float16", lambda single, result: np.copyto(result, single, "unsafe")):
        return with_streamconv(values, target)


def directly(values: Array, target: str) -> Array:
    """Cast by numpy, without float32 in between."""
    with np.errstate(all="ignore"):
        return values.astype(DTYPES[target].numpy)


def with_bits(values: Array, target: str) -> Array:
    """Round float32 to bfloat16 by integer operations, block by block, and count: what ml_dtypes replaced."""
    out, scratch = np.empty(len(values), "bfloat16"), np.empty(casts._BLOCK_ELEMENTS, "<u4")
    for at in range(0, len(values), casts._BLOCK_ELEMENTS):
        part, result = values[at : at + casts._BLOCK_ELEMENTS], out[at : at + casts._BLOCK_ELEMENTS]
        bits, rounded = part.view("<u4"), scratch[: len(part)]
        np.right_shift(bits, 16, out=rounded)
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        result.view("<u2")[:] = rounded
        if (nans := np.isnan(part)).any():
            result[nans] = np.nan
        casts._count_infinite(result, target)
    return out


def samples(source: str, every_float32: bool) -> Iterator[Array]:
    """Yield all 16-bit values; of wider types, values at and near the ties of 16-bit types, and random bits."""
    if source in ("F16", "BF16"):
        yield np.arange(1 << 16, dtype="<u2").view(DTYPES[source].numpy)
        return
    if source == "F32" and every_float32:
        yield from (np.arange(at, at + BLOCK, dtype="<u4").view("<f4") for at in range(0, 1 << 32, BLOCK))
        return
    bits = f"<u{DTYPES[source].itemsize}"
    for small in ("F16", "BF16"):
        with np.errstate(invalid="ignore"):
            each = np.arange(1 << 16, dtype="<u2").view(DTYPES[small].numpy).astype("<f8")
            ties = ((each[:-1] + each[1:]) / 2).astype(DTYPES[source].numpy).view(bits)
        yield from ((ties + np.array(more).astype(bits)).view(DTYPES[source].numpy) for more in (-1, 0, 1))
    generator = np.random.default_rng(0)
    yield np.frombuffer(generator.bytes(BLOCK * DTYPES[source].itemsize), DTYPES[source].numpy)


def differences(cast: Cast, blocks: Iterable[Array], target: str) -> str:
    """Compare a cast with torch's; return how many results differ: those that are not NaNs, and NaNs."""
    total = others = nans = 0
    bits = f"<u{DTYPES[target].itemsize}"
    for values in blocks:
        tensor = torch.frombuffer(bytearray(values.tobytes()), dtype=getattr(torch, DTYPES[CODES[values.dtype]].torch))
        made = tensor.to(getattr(torch, DTYPES[target].torch)).view(torch.uint8).numpy().view(DTYPES[target].numpy)
        have = cast(values, target)
        differs, is_nan = have.view(bits) != made.view(bits), np.isnan(have) & np.isnan(made)
        total += len(values)
        others += int(np.count_nonzero(differs & ~is_nan))
        nans += int(np.count_nonzero(differs & is_nan))
    return f"{total:,} values: {others:,} differ, and {nans:,} NaNs"


def speeds(ways: dict[str, Cast], source: str, target: str) -> dict[str, tuple[float, float]]:
    """Return the source's GB/s in the fastest turn, and the median of the first way's time / this way's."""
    count = PIECE_BYTES // max(DTYPES[source].itemsize, DTYPES[target].itemsize)
    values = (np.random.default_rng(0).standard_normal(count) * 0.02).astype(DTYPES[source].numpy)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, cast in ways.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                cast(values, target)
            times[name].append((time.perf_counter() - start) / CALLS)
    first = next(iter(times.values()))
    return {
        name: (values.nbytes / 1e9 / min(own), statistics.median(map(float.__truediv__, first, own)))
        for name, own in times.items()
    }


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.casts", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--every-float32", action="store_true", help="compare all 2^32 values; takes ten minutes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for source, target in PAIRS:
        for cast in (with_streamconv, with_numpy, directly):
            print(f"{source} to {target}, {cast.__name__}: ", end="", flush=True)
            print(differences(cast, samples(source, args.every_float32), target))
    for source, target in PAIRS:
        ways: dict[str, Cast] = {"streamconv": with_streamconv}
        if target == "F16":
            ways["numpy"] = with_numpy
        if (source, target) == ("F32", "BF16"):
            ways["integer operations"] = with_bits
        for name, (speed, ratio) in speeds(ways, source, target).items():
            print(f"{source} to {target}, {name}: {speed:.2f} GB/s, {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
