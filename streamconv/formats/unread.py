"""Placeholders for what a pickle names and streamconv does not know. Nothing is imported or called for them."""

from typing import Any


class PickleError(Exception):
    """The pickle is damaged, was not written by torch.save, or is larger than that of any checkpoint."""


class Unread:
    """A placeholder for a class or function, or for an object that one of them makes.

    ``items`` are what the pickle puts into the object as into a dict, None if nothing. ``state`` is what the object is
    restored from: its attributes, or else the arguments of the call that makes it.
    """

    __slots__ = ("items", "name", "state")

    def __init__(self, name: str, state: Any = None):
        self.name = name
        self.items: dict[Any, Any] | None = None
        self.state = state


class UnreadKey:
    """A placeholder for a dict's key that is not hashed, because that can take forever: a tuple of shared tuples."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind


def set_items(target: Any, items: list[Any]) -> int:
    """Put ``items``, a key and a value in turn, into a dict or an object. Return how many keys became an `UnreadKey`.

    Raises:
        PickleError: there is no value for a key, or ``target`` takes no items.
    """
    if len(items) % 2:
        raise PickleError("it has a dict key without a value")
    if type(target) is Unread:
        if target.items is None:
            target.items = {}
        target = target.items
    if type(target) is not dict:
        raise PickleError(f"it sets items of a {type(target).__name__}")
    unread = 0
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Ints of more than 64 bits can be chosen so that their hashes collide.
        if type(key) is str or (type(key) is int and not abs(key) >> 63) or key is None or type(key) in (bool, float):
            target[key] = value
        else:
            target[UnreadKey(type(key).__name__ if type(key) in (tuple, int) else "object")] = value
            unread += 1
    return unread
