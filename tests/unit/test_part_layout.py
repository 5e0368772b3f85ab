"""The parts of an upload that a store copies in part: they tile the file, and S3 accepts each of them."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from streamconv.output.stores.part_layout import (
    ALIGNMENT,
    MAX_COPY_BYTES,
    MAX_PARTS,
    MIN_PART_BYTES,
    lay_out_parts,
    uploaded_part_bytes,
)

MIB = 1 << 20
# Sizes around the limits, of what is uploaded and what can be copied, one after the other.
SIZES = st.one_of(
    st.integers(0, 40),
    st.integers(0, 20 * MIB),
    st.integers(-20, 20).map(lambda more: MIN_PART_BYTES + more),
    st.integers(-20, 20).map(lambda more: 8 * MIB + more),
    st.integers(0, 3 * MAX_COPY_BYTES),
    st.integers(0, 60_000 * MIB),
)


@st.composite
def files(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """Return a file's size, and the ranges of it that can be copied."""
    at, copyable = 0, []
    for gap, length in draw(st.lists(st.tuples(SIZES, SIZES), max_size=12)):
        copyable.append((at + gap, at + gap + length))
        at += gap + length
    return at + draw(SIZES), copyable


@given(file=files(), wanted=st.integers(1, 64 * MIB))
def test_parts_tile_the_file_and_are_accepted(file: tuple[int, list[tuple[int, int]]], wanted: int) -> None:
    size, copyable = file
    part_bytes = uploaded_part_bytes(size, wanted)
    parts = lay_out_parts(size, copyable, part_bytes)
    assert [part.start for part in parts] == [0, *(part.end for part in parts)][: len(parts)]
    assert (parts[-1].end if parts else 0) == size
    assert len(parts) <= MAX_PARTS
    for part in parts:
        assert 0 < part.length <= (5 << 30 if part.is_copied else part_bytes)
        assert part.length >= MIN_PART_BYTES or part is parts[-1]
    for part in parts:
        if part.is_copied:
            [(start, end)] = [each for each in copyable if each[0] <= part.start and part.end <= each[1]]
            assert (part.start - start) % ALIGNMENT == 0
            assert part.end == end or (part.end - start) % ALIGNMENT == 0
    for one, other in pairwise(parts):  # an uploaded part is full unless a copied one follows it
        assert one.is_copied or other.is_copied or one.length == part_bytes


@given(file=files(), wanted=st.integers(1, 64 * MIB))
def test_as_much_is_copied_as_the_least_size_of_parts_allows(
    file: tuple[int, list[tuple[int, int]]], wanted: int
) -> None:
    size, copyable = file
    part_bytes = uploaded_part_bytes(size, wanted)
    parts = lay_out_parts(size, copyable, part_bytes)
    for start, end in copyable:
        copied = sum(part.length for part in parts if part.is_copied and start <= part.start < end)
        assert copied == 0 or end - start - copied < max(part_bytes, MIN_PART_BYTES + ALIGNMENT)
        assert copied or end - start < 2 * part_bytes


def test_large_ranges_are_copied_in_several_parts() -> None:
    size = 3 * MAX_COPY_BYTES + 1
    parts = lay_out_parts(size, [(0, size)], 8 * MIB)
    assert [part.is_copied for part in parts] == [True] * 4
    assert max(part.length for part in parts) <= MAX_COPY_BYTES
