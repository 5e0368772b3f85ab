"""The pickle reader, with pieces of the input that end within an opcode."""

import io

import pytest

from streamconv.formats.unpickle import Pickles
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
