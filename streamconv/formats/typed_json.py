"""Parses JSON into dataclasses: state from a disk is checked once, where it is read.

The annotations of a dataclass are its schema. Keys that it does not have are ignored.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from streamconv.display import printable

MAX_BITS = 63  # of an integer: file sizes and times in nanoseconds need no more


def parse(kind: Any, value: object, name: str = "") -> Any:
    """Return ``value`` as ``kind``.

    That is a dataclass, ``Mapping[str, X]``, ``tuple[X, ...]``, a union, a literal of strings, or a type of JSON's.

    Args:
        name: What to call the value in messages; the fields of a dataclass are named from there.

    >>> parse(tuple[int, ...], [1, 2])
    (1, 2)

    Raises:
        ValueError: names the first field that is missing or has another type.
    """
    if kind is Any or type(value) is kind:  # not isinstance: a bool is an int in Python
        if kind is int and isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ValueError(f"its field {printable(name)} is a number of {value.bit_length():,} bits")
        return value
    if kind is float and type(value) is int and value.bit_length() <= MAX_BITS:
        return float(value)
    if get_origin(kind) is Literal and type(value) is str and value in get_args(kind):
        return value
    if get_origin(kind) in (Union, UnionType):
        return _parse_union(kind, value, name)
    if is_dataclass(kind):
        return _parse_dataclass(kind, _mapping(value, name), name)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(parse(get_args(kind)[0], each, f"{name}[{i}]") for i, each in enumerate(value))
    if get_origin(kind) is not Literal and issubclass(get_origin(kind) or kind, Mapping):
        item = get_args(kind)[1]
        return {key: parse(item, each, _join(name, key)) for key, each in _mapping(value, name).items()}
    wanted = getattr(kind, "__name__", kind)
    raise ValueError(f"its field {printable(name)} is {value!r:.60}, which is not of type {wanted}")


def _parse_dataclass(kind: Any, value: Mapping[str, Any], name: str) -> Any:
    arguments = {}
    for field, field_type, is_required in _fields_of(kind):
        if field in value:
            arguments[field] = parse(field_type, value[field], _join(name, field))
        elif is_required:
            raise ValueError(f"its field {printable(_join(name, field))} is missing")
    return kind(**arguments)


@cache  # most of the time to parse a manifest would be spent in it
def _fields_of(kind: Any) -> list[tuple[str, Any, bool]]:
    """Return the name and type of each field of a dataclass, and whether it has no default."""
    types = get_type_hints(kind)
    return [
        (each.name, types[each.name], each.default is MISSING and each.default_factory is MISSING)
        for each in fields(kind)
    ]


def _parse_union(kind: Any, value: object, name: str) -> Any:
    problems = []
    for each in get_args(kind):
        try:
            return parse(each, value, name)
        except ValueError as error:
            problems.append(error)
    raise problems[0]  # our unions name what is usual first


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{f'its field {printable(name)}' if name else 'it'} is not a JSON object")
    return value


def _join(name: str, key: str) -> str:
    return f"{name}.{printable(key)}" if name else printable(key)
