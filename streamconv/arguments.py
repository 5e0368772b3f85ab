"""Checks the types of the arguments and options that a program passes to the library, by their annotations.

A value of a wrong type would otherwise fail in the middle of a job, or be misread: as a flag, "no" would be true.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, Union, get_args, get_origin

from streamconv.display import printable
from streamconv.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = {str: "a string", os.PathLike: "a path", bool: "True or False", int: "a whole number", NoneType: "None"}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that it raises a `UsageError` that names an argument of a wrong type.

    A missing or an unknown argument is a `TypeError`, as for any function.
    """
    signature, annotations = inspect.signature(function), inspect.get_annotations(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        _check(signature.bind(*args, **kwargs).arguments, annotations)
        return function(*args, **kwargs)

    return call


def check_fields(options: object, kind: type) -> None:
    """Check the fields that ``kind``, the class of ``options`` or a base of it, declares.

    Raises:
        UsageError: names the first field of a wrong type.
    """
    annotations = inspect.get_annotations(kind)
    _check({name: getattr(options, name) for name in annotations}, annotations)


def shown_value(value: object) -> str:
    """Return any value for use in a message, even an integer of over 4,300 digits, which Python refuses to print."""
    try:
        return printable(repr(value))
    except Exception:
        kind = f"number of {value.bit_length():,} bits" if isinstance(value, int) else type(value).__name__
        return f"a {kind}"


def _check(given: Mapping[str, object], annotations: Mapping[str, Any]) -> None:
    for name, value in given.items():
        kinds = [*_alternatives(annotations[name])]
        if not any(_is_instance(value, kind) for kind in kinds):
            names = " or ".join(_NAMES.get(kind) or f"a {kind.__name__}" for kind in kinds)
            raise UsageError(f"{name} must be {names}, not {shown_value(value)}.")


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union, without their type arguments; for a callback protocol, `Callable`."""
    if get_origin(annotation) in (Union, UnionType):
        for each in get_args(annotation):
            yield from _alternatives(each)
    elif get_origin(annotation) is Literal:
        yield from {type(value) for value in get_args(annotation)}
    else:
        kind = get_origin(annotation) or annotation
        yield Callable if Protocol in kind.__mro__ else kind


def _is_instance(value: object, kind: type) -> bool:
    if kind in (bool, int):  # True is an int in Python
        return type(value) is kind
    if kind is os.PathLike:
        return isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    return isinstance(value, (int, float) if kind is float else kind)
