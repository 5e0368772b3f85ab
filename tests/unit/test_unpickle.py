"""The pickle reader, with pieces of the input that end within an opcode."""

import io

import pytest

from streamconv.formats import unpickle
from streamconv.formats.unpickle import RECORD_BYTES, Pickles
from streamconv.formats.unread import PickleError


def test_string_longer_than_a_piece_is_read() -> None:
    pickled = b"\x80\x02X" + (300_000).to_bytes(4, "little") + b"a" * 300_000 + b".rest"
    file = io.BytesIO(pickled)

    def refuse(*_: object) -> None:
        raise PickleError

    pickles = Pickles(b"", lambda count: file.read(max(count, 100)))
    assert pickles.load(refuse, refuse) == "a" * 300_000
    assert pickled[file.tell() - len(pickles.rest) :] == b"rest"


def test_long_name_is_read_across_pieces_and_an_unknown_opcode_is_located() -> None:
    for before in range(0, 2400, 50):
        start = b"\x80\x02" + b"N" * before + b"c" + b"m" * 400 + b"\n" + b"n" * 400 + b"\n"
        names: list[str] = []
        Pickles(b"", io.BytesIO(start + b".").read).load(
            lambda *name, names=names: names.extend(name), lambda pid: None
        )
        assert names == ["m" * 400, "n" * 400]
        with pytest.raises(PickleError, match=f"0xff at byte {len(start)},"):
            Pickles(b"", io.BytesIO(start + b"\xff").read).load(lambda *name: None, lambda pid: None)


@pytest.fixture
def megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pickle and its file's records take one megabyte."""
    monkeypatch.setattr(unpickle, "MAX_MEMORY_BYTES", 1_000_000)


def load(pickled: bytes, record_count: int | None = 0) -> object:
    pickles = Pickles(b"", io.BytesIO(pickled).read, record_count)
    return pickles.load(lambda *name: lambda *arguments: None, lambda pid: None)


@pytest.mark.usefixtures("megabyte")
@pytest.mark.parametrize("is_kept", [False, True])
def test_memory_of_arguments_counts_only_while_they_exist(is_kept: bool) -> None:
    calls = []
    for i in range(1, 2_001):
        index = i.to_bytes(4, "little")
        arguments = b"(" + b"h\x00" * 100 + b"tr" + index
        calls.append(arguments + b"h\x00j" + index + b"R" if is_kept else b"h\x00" + arguments + b"R")
    pickled = b"\x80\x02cm\nn\nq\x00" + b"".join(calls) + b"."
    if is_kept:
        with pytest.raises(PickleError, match="bytes of objects"):
            load(pickled)
    else:
        assert load(pickled) is None


@pytest.mark.usefixtures("megabyte")
def test_records_count_as_memory() -> None:
    text = b"\x80\x02X" + (60_000).to_bytes(4, "little") + b"a" * 60_000 + b"."
    assert load(text, 900_000 // RECORD_BYTES) == "a" * 60_000
    with pytest.raises(PickleError, match="bytes of objects"):
        load(text, 960_000 // RECORD_BYTES)
    storages = b"\x80\x02](" + b"K\x00Q" * 4_000 + b"e."
    assert load(storages, 0) == [None] * 4_000
    with pytest.raises(PickleError, match="bytes of objects"):
        load(storages, None)
