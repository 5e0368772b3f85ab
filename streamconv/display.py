"""Escapes and shortens text from files and servers, such as names of tensors and messages, so that it is safe to show.

Such text must not control a terminal, reorder a line, begin a new line or fill a screen. `visible` is applied to every
line where it leaves the program: in a terminal, a log, an error message, a report, a model card. `printable` and
`first_few` also keep each name short, where a message is composed.

A string is therefore shown as one line. Text of several lines is several strings until it is printed.
"""

from collections.abc import Iterable, Iterator, Sequence

LINE_LENGTH = 2_000  # two paths of ordinary length and an explanation, and less than a screen of 80 x 25 characters
NAME_LENGTH = 80
MAX_MARKS = 4  # accents on one letter; more would cover other lines
# Characters that Python calls printable, but that fonts draw as nothing or as a space.
_BLANK = frozenset(
    map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x2800, 0x3164, *range(0xFE00, 0xFE10),
              0xFFA0, *range(0xE0100, 0xE01F0)))
)  # fmt: skip
# Persian and Indic words and emoji sequences need these characters to join their neighbours.
_JOINERS = "\u200c\u200d\ufe0f"
_FIRST_JOINED = "\u0590"


def visible(text: str, length: int = LINE_LENGTH) -> str:
    """Return ``text`` as one line for people, with every character escaped that controls a terminal or reorders text.

    These are line breaks, all other control and format characters, every space but " ", unassigned and private-use
    characters, lone surrogates, and characters that are drawn as nothing. Letters of all scripts and emoji stay. If the
    line is longer than ``length``, its middle is replaced by "…", since its end may say how to fix an error.

    >>> visible("a\\x1b[2Jb\\nLooks ok!\\u202e")
    'a\\\\x1b[2Jb\\\\nLooks ok!\\\\u202e'
    """
    if len(text) <= length and text.isascii() and text.isprintable():
        return text
    line = "".join(_visible_characters(_without_middle(text, length)))
    return _without_middle(line, length)


def _visible_characters(text: str) -> Iterator[str]:
    import unicodedata  # most text is ASCII

    before, marks = "", 0
    for at, c in enumerate(text):
        is_shown = c.isprintable() and c not in _BLANK
        if not c.isascii():
            marks = marks + 1 if unicodedata.category(c) in ("Mn", "Me") else 0
            if c in _JOINERS:
                after = text[at + 1 : at + 2]
                is_shown = before >= _FIRST_JOINED and (c == "\ufe0f" or after > _FIRST_JOINED)
        before = c if is_shown and c not in "\u200c\u200d" else ""
        yield c if is_shown and marks <= MAX_MARKS else c.encode("unicode_escape").decode()


def _without_middle(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 1]}…{text[-end:]}"


def shortened(text: str, length: int) -> str:
    """Return ``text`` cut to ``length`` characters, with "…" at the end if anything was cut."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def printable(text: str) -> str:
    """Return ``text`` for use in a message: shortened to `NAME_LENGTH` characters, escaped as by `visible`."""
    return visible(shortened(text, NAME_LENGTH), 10 * NAME_LENGTH)


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
