"""CRC-32s combined from pieces equal those of zlib, and collecting them takes time in proportion to the pieces."""

import time
import zlib
from contextlib import closing, nullcontext
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamconv.errors import CorruptError
from streamconv.files.base import ByteRange, FileRef
from streamconv.files.local import LocalFile
from streamconv.files.reader import Reader
from streamconv.output.contents import uncut
from streamconv.tensors.checksums import RecordChecks, combine
from streamconv.tensors.expressions import Record

LENGTH = 1 << 20
RECORD = Record(FileRef(Path("x.pth"), LENGTH), "x/data/0", ByteRange(0, LENGTH), 7)


def view(offset: int, count: int, stride: int = 1) -> ByteRange:
    return ByteRange(offset, (count - 1) * stride + 1)


VIEWS = {
    "the last bytes": [view(LENGTH - 8, 8)] * 8_000,
    "parts that overlap": [view(i, 8) for i in range(8_000)],
    "parts with gaps": [view(16 * i, 8) for i in range(8_000)],
    "parts and gaps in turn": [view(16 * (i // 2), 2, 1 + 7 * (i % 2)) for i in range(8_000)],
    "crossing parts": [view(16 * i, 2) for i in range(4_000)] + [view(i, 2, 60_000) for i in range(4_000)],
}


@pytest.mark.parametrize("views", VIEWS)
def test_views_of_one_record_are_checked_in_time_in_proportion_to_their_number(views: str) -> None:
    stored = memoryview(bytes(LENGTH))
    seconds = []
    for _ in range(3):  # other programs can only add to the time
        start, checks = time.process_time(), RecordChecks(Reader())
        for tensor in VIEWS[views]:
            checks.add("x", RECORD, tensor.start, stored[: tensor.length])
        seconds.append(time.process_time() - start)
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.5
    assert checks.is_pending(RECORD)


@given(st.lists(st.tuples(st.integers(0, 31), st.integers(1, 9), st.sampled_from([1, 2])), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_record_is_complete_when_each_byte_was_read(tmp_path: Path, views: list[tuple[int, int, int]]) -> None:
    data = bytes(range(64))
    (tmp_path / "x").write_bytes(bytes(64))  # which nothing reads
    with closing(LocalFile(tmp_path / "x")) as file:
        check_views(data, file, views)


def check_views(data: bytes, file: LocalFile, views: list[tuple[int, int, int]]) -> None:
    record = Record(file.ref, "x", ByteRange(0, 64), zlib.crc32(data))
    checks, read = RecordChecks(Reader([file])), set[int]()
    for offset, count, stride in [*views, (0, 32, 2), (1, 32, 2)]:
        end = min(64, view(offset, count, stride).end)
        checks.add("x", record, offset, memoryview(data)[offset:end])
        read |= {*range(offset, end)}
        assert checks.is_pending(record) == (len(read) < 64)
        if len(read) == 64:
            return


@given(st.sets(st.integers(1, 63), max_size=9), st.randoms(use_true_random=False), st.integers(0, 511))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_damaged_record_is_found_by_its_last_range_in_any_order(
    tmp_path: Path, cuts: set[int], choice: Random, bit: int
) -> None:
    data, stored = bytes(range(64)), bytearray(range(64))
    stored[bit // 8] ^= 1 << bit % 8
    (tmp_path / "x").write_bytes(bytes(64))
    ranges = [*pairwise([0, *sorted(cuts), 64])]
    choice.shuffle(ranges)
    with closing(LocalFile(tmp_path / "x")) as file:
        for contents, is_damaged in ((data, False), (stored, True)):
            record = Record(file.ref, "x", ByteRange(0, 64), zlib.crc32(data))
            checks, covered = RecordChecks(Reader([file])), 0
            with pytest.raises(CorruptError, match="does not match its CRC-32") if is_damaged else nullcontext():
                for start, end in ranges:
                    covered += end - start
                    checks.add("x", record, start, memoryview(contents)[start:end])
            assert covered == 64
            assert checks.is_pending(record) == is_damaged


@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=12))
def test_uncut_offset_cuts_no_piece(position: int, found: list[tuple[int, int]]) -> None:
    places = [(first, first + size) for first, size in found]
    wanted = next(p for p in range(position, -1, -1) if not any(first < p <= last for first, last in places))
    assert uncut(position, places) == wanted


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


@given(
    data=st.binary(min_size=1, max_size=300),
    cuts=st.lists(st.integers(0, 300)),
    order=st.randoms(),
    wrong=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_record_of_which_ranges_are_known_by_their_crcs_is_compared(
    tmp_path: Path, data: bytes, cuts: list[int], order: Random, wrong: bool
) -> None:
    (tmp_path / "x").write_bytes(bytes(len(data)))  # the record itself is not read
    with closing(LocalFile(tmp_path / "x")) as file:
        record = Record(file.ref, "x/data/0", ByteRange(0, len(data)), zlib.crc32(data) ^ wrong)
        checks = RecordChecks(Reader([file]))
        bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        ranges = [*pairwise(bounds)]
        order.shuffle(ranges)
        with pytest.raises(CorruptError) if wrong else nullcontext():
            for first, last in ranges:
                part = data[first:last]
                if order.random() < 0.5:
                    checks.add_crc("x", record, first, len(part), zlib.crc32(part))
                else:
                    checks.add("x", record, first, memoryview(part))
        assert wrong or not checks.is_pending(record)
