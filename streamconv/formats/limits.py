"""Limits on the size of an index and on the names in it, which are checked before anything in it is trusted.

A hostile file must be refused within a second and 100 MB of memory, and a file of 65,536 tensors must open. The
limits here, and those of each format in its own module, follow from these two requirements and were measured.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from streamconv.display import printable
from streamconv.errors import CorruptError, SourceError
from streamconv.files.local import MAX_JSON_BYTES

MAX_TENSORS = 65_536
MAX_NAME_LENGTH = 1_000
MAX_DIMS = 64  # torch's own limit
_MAX_SIZE = (1 << 63) - 1
_MAX_JSON_CONTAINERS = 3 * MAX_TENSORS + 1_000
_MAX_JSON_COMMAS = 8 * MAX_TENSORS + 1_000
_MAX_JSON_QUOTES = 10 * MAX_TENSORS + 4_000  # two per string: a name, three keys and a dtype

MAX_SETTINGS_BYTES = 8 << 20  # the names of ImageNet's 21,841 classes take 2 MB
_MAX_SETTINGS_CONTAINERS = 50_000
MAX_SETTINGS_DEPTH = 50  # pickling, comparing and writing them recurses
_MAX_SETTINGS_COMMAS = 200_000  # those classes, each in id2label and label2id, take 130,000 with those in their names


def check_name(name: str, where: object) -> None:
    """Check the name of a tensor.

    Raises:
        SourceError: it is empty, not printable or longer than `MAX_NAME_LENGTH`.
    """
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise SourceError(
            f"{where} has a tensor named '{printable(name)}', which is empty, not printable or longer than "
            f"{MAX_NAME_LENGTH:,} characters: no model has such a name. Do not trust this file."
        )


def are_sizes(numbers: Iterable[Any]) -> bool:
    """Return whether all are ints, not bools, from 0 to the largest size that torch can hold."""
    for n in numbers:  # noqa: SIM110 - a generator takes twice as long, and this runs for every tensor
        if type(n) is not int or not 0 <= n <= _MAX_SIZE:
            return False
    return True


def is_shape(shape: Sequence[Any]) -> bool:
    """Return whether there are at most `MAX_DIMS` sizes, all valid, whose product without zeros is below 2^60."""
    if len(shape) > MAX_DIMS or not are_sizes(shape):
        return False
    count: int = math.prod(filter(None, shape))
    return count < 1 << 60


def read_json(data: bytes, where: str, parse_float: Callable[[str], float] | None = None) -> dict[str, Any]:
    """Parse a JSON object that contains no name twice in an object and, without ``parse_float``, no floats.

    Raises:
        CorruptError: it is not such an object.
        SourceError: it would take more memory than any checkpoint's index.
    """
    # One wide character makes Python store a whole string in up to four bytes per character.
    max_bytes = MAX_JSON_BYTES if data.isascii() else MAX_JSON_BYTES // 4
    if (
        len(data) > max_bytes
        or data.count(b"{") + data.count(b"[") > _MAX_JSON_CONTAINERS
        or data.count(b",") > _MAX_JSON_COMMAS
        or data.count(b'"') > _MAX_JSON_QUOTES
    ):
        raise SourceError(f"{where} holds more than {MAX_TENSORS:,} tensors need. Do not trust this file.")
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_object, parse_float=parse_float or _refuse, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is damaged: {error}.") from error
    if type(value) is not dict:
        raise CorruptError(f"{where} is damaged: it is not a JSON object.")
    return value


def read_settings(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object such as a model's config.json, which may contain floats.

    Raises:
        CorruptError: it is not such an object.
        SourceError: it would take more memory than any model's configuration.
    """
    try:
        value = parse_small_json(data)
    except TooLargeError as error:
        raise SourceError(f"{where} {error} than the settings of any model.") from None
    except ValueError as error:
        raise CorruptError(f"{where} is not valid JSON: {printable(str(error))}.") from error
    if type(value) is not dict:
        raise CorruptError(f"{where} is not a JSON object.")
    return value


class TooLargeError(ValueError):
    """The JSON holds more, or is nested deeper, than any file of its kind."""


def parse_small_json(data: bytes) -> Any:
    """Parse any small JSON file that others may have written: settings, labels, a manifest, a line of a journal.

    The size of what it holds is estimated before it is parsed.

    Raises:
        TooLargeError: it would take more memory or time than any such file.
        ValueError: it is not valid.
    """
    if (
        len(data) > (MAX_SETTINGS_BYTES if data.isascii() else MAX_SETTINGS_BYTES // 2)  # as in `read_json`
        or data.count(b"{") + data.count(b"[") > _MAX_SETTINGS_CONTAINERS
        or data.count(b",") > _MAX_SETTINGS_COMMAS
    ):
        raise TooLargeError("holds more")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _is_deeper(value, MAX_SETTINGS_DEPTH):
        raise TooLargeError("is nested deeper")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether dicts and lists are nested in more than this number of levels, without recursion."""
    containers = [value] if type(value) in (dict, list) else []
    for _ in range(levels):
        if not containers:
            return False
        values = (part for each in containers for part in (each.values() if type(each) is dict else each))
        containers = [each for each in values if type(each) in (dict, list)]
    return bool(containers)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"'{printable(name)}' appears twice in one object")
            seen.add(name)
    return result


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"{printable(number)} is not an integer")
