"""CRC-32s combined from pieces equal those of zlib."""

import zlib

from hypothesis import given
from hypothesis import strategies as st

from streamconv.tensors.checksums import combine


@given(st.binary(), st.binary())
def test_combined_crc_equals_crc_of_concatenation(first: bytes, second: bytes) -> None:
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_combining_works_for_a_gigabyte() -> None:
    zeros = bytes(1 << 20)
    crc = zlib.crc32(b"x")
    expected = crc
    for _ in range(1 << 10):
        expected = zlib.crc32(zeros, expected)
    many = 0
    for _ in range(1 << 10):
        many = zlib.crc32(zeros, many)
    assert combine(crc, many, 1 << 30) == expected
