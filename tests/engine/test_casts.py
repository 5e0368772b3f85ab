"""Casts equal torch's ``.to()``, except for the payloads of NaNs."""

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.tensors.casts import cast_into

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TARGETS = ("F32", "F16", "BF16")
PAIRS = [(source, target) for source in DTYPES for target in TARGETS if source != target]
# Numbers of exponent and mantissa bits.
FORMATS = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7)}
UNSIGNED = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


def theirs(bits: np.ndarray, source: str, target: str) -> tuple[np.ndarray, int]:
    """Return torch's bits, and how many finite values it made infinite."""
    value = torch.frombuffer(bytearray(bits.tobytes()), dtype=DTYPES[source])
    made = value.to(DTYPES[target])
    overflow_count = int((made.isinf() & value.isfinite()).sum())
    return np.frombuffer(bytes(made.view(torch.uint8).numpy()), UNSIGNED[target]), overflow_count


def ours(bits: np.ndarray, source: str, target: str) -> tuple[np.ndarray, int]:
    made = np.zeros(len(bits), UNSIGNED[target])
    before = bits.copy()
    overflow_count = cast_into(memoryview(bits).cast("B"), source, memoryview(made).cast("B"), target)
    assert np.array_equal(bits, before)
    return made, overflow_count


def is_nan(bits: np.ndarray, dtype: str) -> np.ndarray:
    exponents, mantissas = FORMATS[dtype]
    infinity = ((1 << exponents) - 1) << mantissas
    return (bits & UNSIGNED[dtype](infinity | ((1 << mantissas) - 1))) > infinity


def assert_same(bits: np.ndarray, source: str, target: str) -> None:
    (want, lost), (have, counted) = theirs(bits, source, target), ours(bits, source, target)
    nans = is_nan(have, target)
    other = np.flatnonzero(((want != have) & ~nans) | (is_nan(want, target) != nans))
    assert not len(other), [f"{bits[i]:#x}: {have[i]:#x}, torch {want[i]:#x}" for i in other[:5]]
    signs, wide_signs = (
        values >> UNSIGNED[code](8 * values.itemsize - 1) for values, code in ((have, target), (bits, source))
    )
    assert np.array_equal(signs, wide_signs)  # also of NaNs, whose signs torch does not always keep
    assert counted == lost


def boundaries(source: str) -> np.ndarray:
    """Return all exponents and signs, with mantissas at and near every tie of another format."""
    exponents, mantissas = FORMATS[source]
    values = {0, 1, 2, (1 << mantissas) - 1, (1 << mantissas) - 2}
    for bit in range(mantissas):
        for upper in (0, 1, 2, 3, (1 << mantissas >> bit) - 1, (1 << mantissas >> bit) - 2):
            values |= {(upper << bit) + more for more in (-1, 0, 1)}
    some = np.array(sorted(value for value in values if 0 <= value < 1 << mantissas), np.uint64)
    every = np.arange(1 << exponents, dtype=np.uint64) << np.uint64(mantissas)
    positive = (every[:, None] | some[None, :]).ravel()
    both = np.concatenate([positive, positive | np.uint64(1 << (exponents + mantissas))])
    return both.astype(UNSIGNED[source])


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] in ("F16", "BF16")])
def test_all_16_bit_values_are_cast_like_torch(source: str, target: str) -> None:
    assert_same(np.arange(1 << 16, dtype=np.uint16), source, target)


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] in ("F32", "F64")])
def test_ties_limits_denormals_and_nans_are_cast_like_torch(source: str, target: str) -> None:
    assert_same(boundaries(source), source, target)


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] in ("F32", "F64")])
def test_every_rounding_tie_is_cast_like_torch(source: str, target: str) -> None:
    """Check the middle between any two neighbours of float16 and bfloat16, and the values next to it.

    torch rounds a float64 to float32 first, so a value that is half a float32 step away from the middle counts, too.
    """
    values = []
    for small in ("F16", "BF16"):
        each = np.arange(1 << 16, dtype=np.uint16)
        wide, _ = ours(each, small, "F32")
        with np.errstate(all="ignore"):
            wide = wide.view(np.float32).astype(np.float64)
            middle = ((wide[:-1] + wide[1:]) / 2).astype(np.float32 if source == "F32" else np.float64)
        bits = middle.view(UNSIGNED[source])
        near = (0, 1, *((1 << 28) + more for more in (-1, 0, 1))) if source == "F64" else (0, 1)
        values += [
            change for offset in near for change in (bits + UNSIGNED[source](offset), bits - UNSIGNED[source](offset))
        ]
    assert_same(np.concatenate(values), source, target)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_random_bits_are_cast_like_torch(source: str, target: str) -> None:
    generator = np.random.default_rng(0)
    bits = np.frombuffer(generator.bytes((1 << 20) * UNSIGNED[source]().itemsize), UNSIGNED[source])
    assert_same(bits.copy(), source, target)
    exponents, mantissas = FORMATS[source]
    special = bits | UNSIGNED[source](((1 << exponents) - 1) << mantissas)  # NaNs of all payloads
    assert_same(special, source, target)


@settings(max_examples=300, deadline=None)
@given(pair=st.sampled_from(PAIRS), data=st.data())
def test_any_number_of_any_values_is_cast_like_torch(pair: tuple[str, str], data: st.DataObject) -> None:
    source, target = pair
    exponents, mantissas = FORMATS[source]
    words = st.integers(0, (1 << (1 + exponents + mantissas)) - 1)
    floats = st.floats(width={"F64": 64, "F32": 32, "F16": 16}.get(source, 32))
    patterns = data.draw(st.lists(words, max_size=40))
    numbers = torch.tensor(data.draw(st.lists(floats, max_size=40)), dtype=torch.float64).to(DTYPES[source])
    bits = np.concatenate(
        [np.array(patterns, UNSIGNED[source]), np.frombuffer(bytes(numbers.view(torch.uint8)), UNSIGNED[source])]
    )
    if len(bits):
        assert_same(bits, source, target)


def test_overflows_to_infinity_are_counted() -> None:
    values = torch.tensor([65504.0, 65519.996, 65520.0, -65520.0, 1e38, float("inf"), -float("inf"), float("nan")])
    bits = np.frombuffer(bytes(values.view(torch.uint8)), np.uint32).copy()
    assert ours(bits, "F32", "F16")[1] == 3
    assert ours(bits, "F32", "BF16")[1] == 0
    large = np.array([0x7F7FFFFF, 0xFF7F8000, 0x7F7F7FFF], np.uint32)  # the first two round beyond bfloat16's range
    assert ours(large, "F32", "BF16")[1] == 2
    assert ours(np.array([1e300, -1e39, 1e38, np.inf]).view(np.uint64), "F64", "F32")[1] == 2


def test_threads_cast_at_once_and_keep_no_memory_when_they_end() -> None:
    bits = boundaries("F32")
    want, lost = theirs(bits, "F32", "F16")
    finite = ~is_nan(want, "F16")
    all_started = threading.Barrier(8)

    def cast(_: int) -> bool:
        all_started.wait()
        have, counted = ours(bits, "F32", "F16")
        return np.array_equal(have[finite], want[finite]) and counted == lost

    ours(bits, "F32", "F16")
    tracemalloc.start()
    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(cast, range(8)))
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left < 200 << 10  # less than one thread's memory for intermediate values
