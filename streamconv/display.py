"""How text from elsewhere is shown: names of files and tensors, what a file or a server says.

Nothing that others wrote may control a terminal, reorder a line or fill a screen. `visible` is applied once to all text
at the border, where it leaves the program. `printable` and `first_few` keep a message short where it is written.
"""

from collections.abc import Iterable, Iterator, Sequence


def visible(text: str) -> str:
    """Escape what controls a terminal or reorders text: names of files, and what files say, may contain it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\xa0" else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, length: int) -> str:
    """Return ``text``, with "…" for what is beyond ``length`` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def printable(text: str) -> str:
    """Return ``text`` for use in a message: shortened to 80 characters, without control characters."""
    text = shortened(text, 80)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def first_few(names: Iterable[str], count: int = 5) -> str:
    """Return the first names for use in a message, and how many more there are.

    >>> first_few("abc", 2)
    'a, b and 1 more'
    """
    listed = [*names]
    more = f" and {len(listed) - count:,} more" if len(listed) > count else ""
    return ", ".join(map(printable, listed[:count])) + more


def first_lines(lines: Sequence[str], shown: int, count: int) -> Iterator[str]:
    """Yield the first lines and, if there are more than ``shown``, how many of ``count`` are left out."""
    yield from lines[:shown]
    if count > shown:
        yield f"… and {count - shown:,} more"
