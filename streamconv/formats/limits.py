"""How much a checkpoint may ask for before anything of it is believed, and what its names may be.

A hostile file must be refused within a second and 100 MB, and one of 65,536 tensors must open: the
limits of each format, beside its reader, follow from these two and were measured.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from streamconv.errors import CorruptError, SourceError, printable
from streamconv.files.local import MAX_JSON_BYTES

MAX_TENSORS = 65_536
MAX_NAME_LENGTH = 1_000
MAX_DIMS = 64  # torch's own limit
_MAX_SIZE = (1 << 63) - 1
_MAX_JSON_CONTAINERS = 3 * MAX_TENSORS + 1_000
_MAX_JSON_COMMAS = 8 * MAX_TENSORS + 1_000
_MAX_JSON_QUOTES = 10 * MAX_TENSORS + 4_000  # two a string: a name, three keys and a dtype


def check_name(name: str, where: object) -> None:
    """Refuse what no model calls a tensor.

    Raises:
        SourceError
    """
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise SourceError(
            f"{where} names a tensor '{printable(name)}', which is empty, not printable or longer than "
            f"{MAX_NAME_LENGTH:,} characters: no model has such a name. Do not trust this file."
        )


def are_sizes(numbers: Iterable[Any]) -> bool:
    """Whether they are ints, no bools, from 0 to what torch can hold."""
    for n in numbers:  # noqa: SIM110 - a generator would take twice as long, for every tensor
        if type(n) is not int or not 0 <= n <= _MAX_SIZE:
            return False
    return True


def is_shape(shape: Sequence[Any]) -> bool:
    """Whether its sizes are, and the bytes of its elements can be counted, even where one size is 0."""
    if len(shape) > MAX_DIMS or not are_sizes(shape):
        return False
    count: int = math.prod(filter(None, shape))
    return count < 1 << 60


def read_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``data``, without floats, and without a name that stands twice in an object.

    Raises:
        CorruptError: it is none.
        SourceError: it would take more memory than any checkpoint's index.
    """
    if (
        len(data) > (MAX_JSON_BYTES if data.isascii() else MAX_JSON_BYTES // 4)  # one wide character widens all
        or data.count(b"{") + data.count(b"[") > _MAX_JSON_CONTAINERS
        or data.count(b",") > _MAX_JSON_COMMAS
        or data.count(b'"') > _MAX_JSON_QUOTES
    ):
        raise SourceError(f"{where} holds more than {MAX_TENSORS:,} tensors need. Do not trust this file.")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_float=_refuse, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is damaged: {error}.") from error
    if type(value) is not dict:
        raise CorruptError(f"{where} is damaged: it is no JSON object.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"'{printable(name)}' stands twice in one object")
            seen.add(name)
    return result


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"{printable(number)} is no whole number")
