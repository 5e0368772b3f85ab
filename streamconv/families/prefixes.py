"""Finds the prefix that the user means among those that a file has."""

import re
import sys
from bisect import bisect_left
from collections.abc import Collection, Iterable

from streamconv.errors import MappingError, UsageError
from streamconv.families.near_names import near_names
from streamconv.families.wrapped_names import unwrapped

MAX_CHOICES = 3  # prefixes that a message about another prefix suggests
LAST = chr(sys.maxunicode)  # sorts after every other character
_USUAL = re.compile(r"(?<![a-z])(?<!gram_)(teacher|ema)(?![a-z])", re.IGNORECASE)  # the copies that training evaluates


def matching_prefixes(given: str, found: Iterable[str]) -> list[str]:
    """Return the prefix found that ``given`` is, or else all that start or end with it, or else all that contain it.

    Only whole parts count. The last dot and the parts that wrappers insert may be missing in ``given``.

    >>> matching_prefixes("teacher", ["student.module.backbone.", "teacher.backbone."])
    ['teacher.backbone.']
    >>> matching_prefixes("student.backbone", ["student.module.backbone.", "teacher.backbone."])
    ['student.module.backbone.']
    """
    wanted = given and f"{given.rstrip('.')}."
    spellings = {each: {each, unwrapped(each)} for each in found}
    if wanted in spellings:
        return [wanted]
    equal = [each for each in spellings if unwrapped(each) == unwrapped(wanted)]
    if equal or not wanted:
        return equal
    containing = [each for each, spelled in spellings.items() if any(f".{wanted}" in f".{one}" for one in spelled)]
    outer = [
        each
        for each in containing
        if any(f".{one}".endswith(f".{wanted}") or one.startswith(wanted) for one in spellings[each])
    ]
    return outer or containing


def complete_prefix(
    given: str, found: Collection[str], where: str, option: str = "--select", what: str = "backbone"
) -> str:
    """Return the only prefix that ``given`` stands for; ``option`` is the one that gave it, for messages.

    Raises:
        UsageError: there is none, or there are several; suggests those that are near.
    """
    matching = matching_prefixes(given, found)
    if len(matching) == 1:
        return matching[0]
    near = matching or near_names(given.rstrip("."), found) or [*found]
    if near == [""]:
        raise UsageError(f"{where} does not have a {what} under {given}, but one without a prefix. Omit {option}.")
    choices = " or ".join(f"{option} {shown(each)}" for each in near[:MAX_CHOICES])
    under = f"one {what} under {given}" if given else f"a {what} without a prefix"
    raise UsageError(f"{where} does not have {under}. Use {choices}." if choices else f"{where} holds no {what}.")


def several_backbones(found: Iterable[str], names: Iterable[str], where: str) -> MappingError:
    """Return the error for a file of ``names`` with backbones under several prefixes."""
    usual = [each for each in found if _USUAL.search(each)]
    hint = f", usually {shown(usual[0])}" if len(usual) == 1 else ""
    ordered = sorted(names)
    counts = {each: bisect_left(ordered, each + LAST) - bisect_left(ordered, each) for each in found}
    return MappingError(
        f"{where} holds several backbones. Choose one with --select PREFIX{hint}:",
        (f"{each or '(none)'} {count:,} tensors" for each, count in counts.items()),
    )


def shown(prefix: str) -> str:
    """Return a prefix as a user types it."""
    return prefix.rstrip(".") or repr("")
