"""Finds the tensors in what a pickle of torch.save holds: nested dicts, lists, and objects of unknown classes."""

from collections.abc import Iterator
from dataclasses import replace
from sys import getsizeof
from typing import Any

from streamconv.display import printable
from streamconv.errors import NotACheckpointError, SourceError, UnsafePickleError
from streamconv.formats.limits import MAX_NAME_LENGTH, MAX_TENSORS, check_name
from streamconv.formats.non_tensors import Kind, NonTensor, describe
from streamconv.formats.unread import Unread, UnreadKey
from streamconv.tensors.expressions import Read

_MAX_NON_TENSORS = 10_000
_MAX_ENTRIES = 4 * MAX_TENSORS  # in all nested dicts together; an optimizer has a few for each tensor
_MAX_NAMES_BYTES = 10 << 20  # 65,536 names of 60 characters take 7 MB


def find_tensors(contents: Any, where: str) -> tuple[dict[str, Read], dict[str, NonTensor]]:
    """Return the tensors in nested dicts, by their keys joined with dots, and other objects by name.

    A key that is not a string is named as Python prints it, or <tuple 1>, <tuple 2> and so on; see `UnreadKey`.

    Objects of other classes are read as dicts if they are mappings (`_items_of`). None is not listed, as a model that
    has no bias may state one as None.

    Raises:
        NotACheckpointError, UnsafePickleError, SourceError
    """
    search = _Search()
    items = _items_of(contents)
    if items is None:
        raise _not_a_dict(contents, where, search)
    tensors: dict[str, Read] = {}
    non_tensors: dict[str, NonTensor] = {}
    names_bytes = 0
    for name, value in _walk(items, where):
        if type(value) is Read:
            check_name(name, where)
            if name in tensors:
                raise SourceError(f"{where} has two tensors named '{printable(name)}'. Do not trust this file.")
            tensors[name] = value
            if len(tensors) > MAX_TENSORS:
                raise SourceError(f"{where} has more than {MAX_TENSORS:,} tensors. Do not trust this file.")
        elif value is not None and (
            (other := search.describe(value) or _plain_value(value)).kind.is_tensor
            or len(non_tensors) < _MAX_NON_TENSORS
        ):
            non_tensors[name] = other
        else:
            continue
        names_bytes += getsizeof(name)
        if names_bytes > _MAX_NAMES_BYTES:
            raise SourceError(
                f"{where} has names of more than {_MAX_NAMES_BYTES:,} bytes in total. Do not trust this file."
            )
    return tensors, non_tensors


def _walk(items: dict[Any, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Yield the values in nested dicts with their names. Few of them are in memory at once.

    Raises:
        SourceError: there are too many: a dict may be in many others, or in itself.
    """
    levels = [("", iter(items.items()))]
    count, unread_keys = len(items), 0
    while levels:
        prefix, rest = levels[-1]
        item = next(rest, None)
        if item is None:
            levels.pop()
            continue
        key, value = item
        if type(key) is UnreadKey:
            unread_keys += 1
            key = f"<{key.kind} {unread_keys}>"
        name = prefix + str(key)[: MAX_NAME_LENGTH + 1]
        inner = _items_of(value)
        count += len(inner or ())
        if count > _MAX_ENTRIES or (inner and len(name) > MAX_NAME_LENGTH):
            raise SourceError(
                f"{where} has dicts that are nested too deeply or have too many entries. Do not trust this file."
            )
        if inner:
            levels.append((f"{name}.", iter(inner.items())))
        else:
            yield name, value


def _items_of(value: Any) -> dict[Any, Any] | None:
    """Return the items of a dict, or of an object that is one: of a class derived from dict, or of UserDict's kind.

    Picklers set the items of such an object as those of a dict; or the object's only argument, or its only attribute,
    ``data``, is a dict.
    """
    if type(value) is dict:
        return value
    if type(value) is not Unread:
        return None
    if value.items:
        return value.items
    state = value.state
    if type(state) is dict and len(state) == 1:
        state = (state.get("data"),)
    return state[0] if type(state) is tuple and len(state) == 1 and type(state[0]) is dict else None


class _Search:
    """Describes values that are not dicts. The search for tensors in them ends after a total number of values."""

    def __init__(self) -> None:
        self._values_left = _MAX_ENTRIES

    def describe(self, value: Any) -> NonTensor | None:
        if type(value) is NonTensor:
            return value
        if type(value) is Unread:
            other = describe(value)
            if other.kind is Kind.OBJECT and self.holds_tensor(value.state):
                return replace(other, kind=Kind.ATTRIBUTES)
            return other
        if type(value) in (list, tuple) and self.holds_tensor(value):
            return NonTensor(type(value).__name__, Kind.LIST)
        return None

    def holds_tensor(self, value: Any) -> bool:
        waiting = [value]
        while waiting:
            each = waiting.pop()
            if type(each) is Read or type(each) is NonTensor:
                return True
            parts: Any = ()
            if type(each) is dict:
                parts = each.values()
            elif type(each) in (list, tuple):
                parts = each
            elif type(each) is Unread:
                parts = (each.items, each.state)
            self._values_left -= len(parts)
            if self._values_left < 0:
                return False
            waiting += parts
        return False


def _plain_value(value: Any) -> NonTensor:
    name = type(value).__name__ if type(value).__module__ == "builtins" else "object"  # such as torch.uint16
    return NonTensor(f"Python {name}", Kind.VALUE)


def _not_a_dict(contents: Any, where: str, search: _Search) -> SourceError:
    other = search.describe(contents)
    if other is None or other.kind.is_tensor:
        kind = "tensor" if type(contents) is Read else other or type(contents).__name__
        return NotACheckpointError(f"{where} holds a {kind}, not a dict of tensors.")
    if other.kind is Kind.LIST:
        at, item = next(((i, each) for i, each in enumerate(contents) if search.holds_tensor(each)), (0, None))
        alone = "dict(torch.load('old.pth'))" if type(item) in (list, tuple) else f"torch.load('old.pth')[{at}]"
        return NotACheckpointError(
            f"{where} holds a {other} with tensors in it, not a dict of tensors. Save one dict alone, such as "
            f"torch.save({alone}, 'new.pth')."
        )
    if other.kind is Kind.MODULE:
        return UnsafePickleError(
            f"{where} holds a whole model, a {other}, whose code would have to run. Nothing in it was run. If you "
            "trust the file and can import its class, save its state dict: "
            "torch.save(torch.load('old.pth', weights_only=False).state_dict(), 'new.pth')."
        )
    return UnsafePickleError(
        f"{where} holds a {other}, which is not a dict of tensors. Nothing in it was run. Save a dict of tensors, "
        "such as model.state_dict()."
    )
