"""The position of a zip record's bytes is computed as torch chooses it, without reading the local header."""

from typing import Any

import pytest

from streamconv.files.base import ByteRange
from streamconv.formats.zip_directory import _Entry, _have_torch_layout, _torch_data_range


@pytest.mark.parametrize(
    ("name", "offset", "size", "start"),
    [
        ("big/data/1", 4152, 4 << 30, 4224),
        ("big/data/12", 4294972864, 44, 4294972928),
        ("big/data/32", 4294976784, 124, 4294976896),
        ("big/version", 4294979384, 2, 4294979456),
        ("big/.data/serialization_id", 4294979482, 40, 4294979584),
    ],
)
def test_record_positions_are_predicted_beyond_four_gibibytes(name: str, offset: int, size: int, start: int) -> None:
    """The numbers are from a file in which torch 2.15 wrote 4 GiB and some small tensors, with 64-bit offsets."""
    assert _torch_data_range(_Entry(offset, size, 0, name)) == ByteRange(start, size)


def test_records_too_dense_for_torchs_layout_are_not_predicted() -> None:
    nothing_is_read: Any = None
    entries = [_Entry(1_000, 10, 0, "a/data/1"), _Entry(0, 990, 0, "a/data/0")]  # the first one would end at 64 + 990
    assert not _have_torch_layout(nothing_is_read, entries, 2_000)
