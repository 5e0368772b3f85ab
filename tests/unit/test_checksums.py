"""CRC-32s combined from pieces equal those of zlib."""

import zlib

from hypothesis import given
from hypothesis import strategies as st

from streamconv.tensors.checksums import combine


@given(st.binary(), st.binary())
def test_combined_crc_equals_crc_of_concatenation(first: bytes, second: bytes) -> None:
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_combining_works_for_gigabytes() -> None:
    """Appending 2^24 zeros agrees with zlib, and appending 2^k zeros twice equals appending 2^(k + 1)."""
    crc = zlib.crc32(b"x")
    zeros = zlib.crc32(bytes(1 << 24))
    assert combine(crc, zeros, 1 << 24) == zlib.crc32(bytes(1 << 24), crc)
    for power in range(24, 40):
        assert combine(combine(crc, 0, 1 << power), 0, 1 << power) == combine(crc, 0, 1 << (power + 1))
