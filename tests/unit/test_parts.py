"""A plan's weight files are divided into parts of about equal size, and each file belongs to one part."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.errors import UsageError
from streamconv.files.address import Address
from streamconv.files.base import ByteRange, FileRef
from streamconv.planning.parts import Part, shards_of
from streamconv.planning.shards import Shard
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import TensorInfo


def shards(sizes: list[int]) -> list[Shard]:
    record = Record(FileRef(Address("https://host/x"), 0), "x", ByteRange(0, 0))
    return [
        Shard(f"model-{i}.safetensors", b"", (("x", Read(TensorInfo("U8", (size,)), record, 0, (1,))),))
        for i, size in enumerate(sizes)
    ]


@given(sizes=st.lists(st.integers(0, 1000), max_size=40), count=st.integers(1, 50))
def test_each_file_belongs_to_one_part_and_parts_are_balanced(sizes: list[int], count: int) -> None:
    files = shards(sizes)
    parts = [shards_of(files, Part(number, count)) for number in range(1, count + 1)]
    assert sorted(file.filename for part in parts for file in part) == sorted(file.filename for file in files)
    for part in parts:
        assert list(part) == sorted(part, key=files.index)  # in the plan's order
    totals = [sum(file.size for file in part) for part in parts]
    # No part can be relieved by giving its smallest file to the smallest part.
    for part, total in zip(parts, totals, strict=True):
        if part:
            assert total - min(file.size for file in part) <= min(totals)


def test_equal_files_are_divided_equally() -> None:
    files = shards([10] * 128)
    assert {len(shards_of(files, Part(number, 16))) for number in range(1, 17)} == {8}


@pytest.mark.parametrize("text", ["3/16", " 3/16 ", "03/016"])
def test_part_is_parsed_and_shown_in_one_spelling(text: str) -> None:
    assert Part.parse(text) == Part(3, 16)
    assert str(Part.parse(text)) == "3/16"
    assert Part.parse(Part(3, 16)) == Part(3, 16)


@pytest.mark.parametrize(
    "text", ["", "3", "0/16", "17/16", "-1/16", "3/0", "3:16", "1/10001", "1/999999999", "٣/16", "3/16/1", "1.5/2"]
)
def test_invalid_parts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a part. Write it as 3/16"):
        Part.parse(text)


@pytest.mark.parametrize("numbers", [(0, 2), (5, 3), (-1, 2), (1, 10**9), ("a", 2), (1, 2.0), (True, 2)])
def test_part_that_does_not_exist_cannot_be_made(numbers: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="is not a part"):
        Part(*numbers)
