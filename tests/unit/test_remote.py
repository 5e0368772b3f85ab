"""Remote reads, in an announced order or not, return the file's bytes, however unreliable the connection is."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv import NetworkError, TruncatedError
from streamconv.files import remote, retries
from streamconv.files.address import Address
from streamconv.files.base import ByteRange
from streamconv.files.remote import GAP_BYTES, RemoteFile
from streamconv.files.retries import RetryLater, RetryNow

DATA = random.Random(0).randbytes(300_000)
SHARE_THAT_BREAKS = 4
WAITS_SECONDS = retries.RETRY_WAITS_SECONDS  # those of a user: each test runs with shorter ones


class FakeFile(RemoteFile):
    """Serves `DATA` and counts the bytes. Some calls fail, but never more than two without a byte in between."""

    request_bytes = 20_000

    def __init__(self, seed: int = 0, breaks: bool = True):
        self.size = len(DATA)
        super().__init__(Address("fake://host/file?signature=secret"))
        self.random, self.breaks = random.Random(seed), breaks
        self.in_a_row = self.given = self.closed = 0
        self.asked: list[ByteRange] = []

    @property
    def version(self) -> dict[str, str | int | None]:
        return {}

    def require_unchanged(self) -> None: ...

    def maybe_break(self) -> None:
        if self.breaks and self.in_a_row < 2 and not self.random.randrange(SHARE_THAT_BREAKS):
            self.in_a_row += 1
            raise self.random.choice([ConnectionResetError, TimeoutError, lambda: RetryLater("busy", 0)])()

    def _request(self, wanted: ByteRange) -> "FakeAnswer":
        self.asked.append(wanted)
        return FakeAnswer(self, wanted)


class FakeAnswer:
    def __init__(self, file: FakeFile, wanted: ByteRange):
        self.file, self.at, self.end = file, wanted.start, wanted.end

    def readinto(self, buffer: memoryview) -> int:
        self.file.maybe_break()
        count = min(len(buffer), self.end - self.at, self.file.random.choice([1, 100, 5_000, 100_000]))
        buffer[:count] = DATA[self.at : self.at + count]
        self.at += count
        self.file.given += count
        self.file.in_a_row = 0
        return count

    def close(self) -> None:
        self.file.closed += 1


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(retries, "ENOUGH_BYTES", 1)


def read(file: RemoteFile, where: ByteRange) -> bytes:
    data = bytearray(where.length)
    file.read_at(where.start, memoryview(data))
    return bytes(data)


ranges = st.builds(
    lambda start, length: ByteRange(start, min(length, len(DATA) - start)),
    st.integers(0, len(DATA)),
    st.one_of(st.integers(0, 50), st.integers(0, 100_000)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ranges, max_size=12), st.lists(ranges, max_size=3), st.integers(0, 1 << 30))
def test_reads_equal_the_file_although_the_connection_breaks(
    expected: list[ByteRange], others: list[ByteRange], seed: int
) -> None:
    file = FakeFile(seed)
    file.prefetch(expected)
    reads = list(expected)
    for other in others:
        reads.insert(file.random.randrange(len(reads) + 1), other)
    for where in reads:
        assert read(file, where) == DATA[where.start : where.end]


@settings(max_examples=100, deadline=None)
@given(st.lists(ranges, max_size=12), st.integers(0, 1 << 30))
def test_small_index_reads_equal_the_file(reads: list[ByteRange], seed: int) -> None:
    file = FakeFile(seed)
    for where in reads:
        assert file.read(where.start, where.length) == DATA[where.start : where.end]


def in_order(count: int, length: int, gap: int) -> Iterable[ByteRange]:
    return [ByteRange(i * (length + gap), length) for i in range(count)]


def test_neighbouring_prefetched_ranges_are_requested_together_and_once() -> None:
    file = FakeFile(breaks=False)
    wanted = list(in_order(100, 1_000, 64))
    file.prefetch(wanted)
    for where in wanted:
        read(file, where)
    last = wanted[-1].end
    assert file.given == last
    assert len(file.asked) == -(-last // file.request_bytes)


def test_distant_prefetched_ranges_are_requested_without_the_gaps() -> None:
    file = FakeFile(breaks=False)
    wanted = list(in_order(6, 100, GAP_BYTES + 1))
    file.prefetch(wanted)
    read(file, wanted[0])
    assert file.asked == wanted[: remote.MAX_IN_FLIGHT]
    for where in wanted[1:]:
        read(file, where)
    assert (file.asked, file.given) == (wanted, 600)


def test_prefetched_ranges_keep_their_order_and_skipped_ones_are_dropped() -> None:
    file = FakeFile(breaks=False)
    wanted = [ByteRange(200_000, 100), ByteRange(50_000, 100), ByteRange(40_000, 100), ByteRange(40_200, 100)]
    file.prefetch(wanted)
    read(file, wanted[1])
    assert file.asked == [wanted[0], wanted[1], ByteRange(40_000, 300)]
    assert (file.given, file.closed) == (100 + 100, 2)  # the first one, whose response is short, was read to its end


def test_broken_connection_is_retried_with_growing_waits_for_at_most_two_minutes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(retries, "RETRY_WAITS_SECONDS", WAITS_SECONDS)
    monkeypatch.setattr(retries.time, "sleep", waited.append)
    file = FakeFile()
    file._request = lambda wanted: exec("raise ConnectionRefusedError('refused')")  # type: ignore[assignment, method-assign]
    with pytest.raises(NetworkError, match=r"fake://host/file cannot be read at byte 7: refused \(tried 9 times\)"):
        file.read_at(7, memoryview(bytearray(1)))
    assert waited == sorted(waited)
    assert 60 <= sum(waited) <= 120
    assert len(caplog.records) == len(waited)
    assert caplog.messages[-1] == "fake://host/file: refused; trying again in 30 s"


def test_no_secret_of_an_address_is_logged_even_if_a_library_names_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "streamconv")
    file = FakeFile()
    text = "raise OSError('no connection to (https://user:secret@host/file?signature=secret), port=443')"
    file._request = lambda wanted: exec(text)  # type: ignore[assignment, method-assign]
    with pytest.raises(NetworkError) as caught:
        file.read_at(7, memoryview(bytearray(1)))
    assert "fake://host/file: requesting bytes 7 to 8" in caplog.messages
    assert "no connection to (https://host/file" in caplog.text
    assert "secret" not in caplog.text + str(caught.value)


def test_received_bytes_reset_the_retries() -> None:
    """Two failures and some bytes alternate: there are more failures in all than are allowed in a row."""
    file = FakeFile(seed=1)
    file.random.choice = lambda kinds: kinds[0]  # type: ignore[assignment]
    where = ByteRange(0, 300)
    failures = 0
    wait = file._retries.wait

    def counted(error: OSError, position: int | None) -> None:
        nonlocal failures
        failures += 1
        wait(error, position)

    file._retries.wait = counted  # type: ignore[method-assign]
    assert read(file, where) == DATA[:300]
    assert failures > len(retries.RETRY_WAITS_SECONDS)


@pytest.mark.parametrize(("count", "is_enough"), [(1, False), (200, False), (400, True)])
def test_server_that_sends_almost_nothing_in_each_response_is_given_up(
    count: int, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "ENOUGH_BYTES", 30_000)
    file = FakeFile(breaks=False)
    file.request_bytes = len(DATA)

    def ask(wanted: ByteRange) -> FakeAnswer:
        file.asked.append(wanted)
        return FakeAnswer(file, ByteRange(wanted.start, min(count, wanted.length)))

    file._request = ask  # type: ignore[method-assign]
    if is_enough:
        assert read(file, ByteRange(0, len(DATA))) == DATA
        return
    with pytest.raises(NetworkError, match=rf"at byte {101 * count:,}: the connection was closed \(tried 101 times\)"):
        read(file, ByteRange(0, len(DATA)))
    assert len(file.asked) == 101


def test_requested_waits_are_respected_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(retries, "RETRY_WAITS_SECONDS", WAITS_SECONDS)
    monkeypatch.setattr(retries.time, "sleep", waited.append)
    file = FakeFile()
    errors = [RetryNow("moved"), RetryLater("busy", 17.0), RetryLater("busy", 9999.0), RetryLater("busy", None)]

    def ask(wanted: ByteRange) -> FakeAnswer:
        if errors:
            raise errors.pop(0)
        file.breaks = False
        return FakeAnswer(file, wanted)

    file._request = ask  # type: ignore[method-assign]
    assert read(file, ByteRange(5, 5)) == DATA[5:10]
    assert waited == [17.0, 30, 2]


def test_reading_beyond_the_end_is_refused() -> None:
    with pytest.raises(TruncatedError, match="ends at byte 300,000"):
        FakeFile().read_at(len(DATA) - 1, memoryview(bytearray(2)))
