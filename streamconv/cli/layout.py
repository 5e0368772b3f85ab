"""Prints lines for people: wrapped at words and coloured in a terminal, unwrapped in a pipe or a log.

All text that reaches a terminal passes through here. A line may contain text from a file or a server, which `laid_out`
escapes, so only `Line` makes colours, and only the end of a line is a line break.
"""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO

import click

from streamconv.display import visible
from streamconv.errors import SHOWN_PROBLEMS

# Parts that are not broken at their spaces: commands, options with their values, shapes, numbers with their units.
_UNBROKEN = r"`[^`]+`|--[\w-]+ \S+|\[[\d, ]+\]|streamconv \w+ --\w+|\d (?:bytes|[kMGT]B(?:/s)?|s|min|h)\b"
_NO_BREAK = "\0"  # stands for their spaces while text is wrapped; no path can contain it
MIN_COLUMNS = 40
MIN_HANG = 2  # so that wrapped text from a file or server never looks like a new line
_FOLDERS = ("HOME", "TORCH_HOME", "XDG_CACHE_HOME", "TMPDIR")
MAX_UNBROKEN = 80  # characters; longer parts are broken, unless the user typed them
_BLOCK_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
FEW_ALIKE = 2  # lines that differ only in a block's number and are still printed one by one


@dataclass(frozen=True)
class Line:
    """A line: a ``label``, a ``head`` in colour or bold, and the text.

    Continuation lines are indented by ``hang`` columns; by default, they are aligned with the beginning of the text.
    """

    head: str
    text: str
    hang: int | None = None
    colour: str | None = None
    is_bold: bool = False
    label: str = ""


def indented(text: str) -> Line:
    """Return a line that keeps its indentation. Continuation lines are indented by two more columns."""
    words = text.lstrip(" ")
    indent = len(text) - len(words)
    return Line(" " * indent, words, indent + 2)


def error_lines(message: str, problems: Sequence[str] = (), count: int = 0) -> list[Line]:
    """Return an error's lines. ``count``: the total number of problems, if ``problems`` are the first of them."""
    listed = [f"  {line}" for line in folded(problems, max(count, len(problems)))]
    return [Line("error: ", message, colour="red", is_bold=True), *map(indented, listed)]


def folded(lines: Sequence[str], count: int = 0) -> Iterator[str]:
    """Yield one line for all that differ only in block numbers, which become a *: a model may have many blocks.

    At most `SHOWN_PROBLEMS` are yielded, and a line that counts the rest. ``count``: the total number of lines, if
    ``lines`` are the first of them.
    """
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(_BLOCK_NUMBER.sub("*", line), []).append(line)
    shown, are_folded = 0, False
    entries = ((group, [pattern]) if len(group) > FEW_ALIKE else (group, group) for pattern, group in groups.items())
    left = SHOWN_PROBLEMS
    for group, texts in entries:
        if len(texts) == 1 and len(group) > 1:
            texts, are_folded = [f"{texts[0]} ({len(group):,} tensors)"], True
        if len(texts) > left:
            break
        yield from texts
        left -= len(texts)
        shown += len(group)
    if (more := max(count, len(lines)) - shown) > 0:
        yield f"… and {more:,} more; --json lists {'them' if count <= len(lines) else f'the first {len(lines):,}'}"
    if are_folded:
        yield "(* stands for the blocks' numbers; --json lists each tensor)"


def columns_of(stream: TextIO) -> int:
    """Return a terminal's width: COLUMNS, or that of stdout or, if stdout is a file, of ``stream``."""
    try:
        size = os.get_terminal_size(stream.fileno())
    except OSError:  # it is not a terminal
        size = os.terminal_size((80, 24))
    return shutil.get_terminal_size(size).columns


def print_wrapped(lines: Iterable[str | Line], stream: TextIO) -> None:
    """Print lines, wrapped if ``stream`` is a terminal.

    NO_COLOR switches colours off and FORCE_COLOR on, whatever the stream is (https://no-color.org).
    """
    columns = max(columns_of(stream), MIN_COLUMNS) if stream.isatty() else None
    is_coloured = False if os.environ.get("NO_COLOR") else True if os.environ.get("FORCE_COLOR") else None
    for line in lines:
        click.echo(laid_out(line, columns), stream, color=is_coloured)


def print_unwrapped(lines: Iterable[str], stream: TextIO) -> None:
    """Print lines that are copied or read by a program: commands, scripts, JSON. No line is wrapped or shortened."""
    # The longest escape of a character has ten characters.
    click.echo("\n".join(visible(line, 10 * len(line) + 1) for line in lines), stream)


def laid_out(line: str | Line, columns: int | None) -> str:
    """Return a line, wrapped to ``columns``. Words, `_UNBROKEN` parts and the user's arguments are never broken."""
    line = line if isinstance(line, Line) else indented(line)
    label, head, text = visible(line.label), visible(line.head), visible(line.text)
    is_styled = bool(head) and (line.colour is not None or line.is_bold)
    begin = label + (click.style(head, fg=line.colour, bold=line.is_bold or None) if is_styled else head)
    if columns is None:
        return begin + text
    typed = map(re.escape, _paths_with_spaces())
    head = " " * len(label + head)
    hang = " " * max(MIN_HANG, len(head) if line.hang is None else line.hang)
    wrapped = textwrap.fill(
        re.sub("|".join([*typed, _UNBROKEN]), _without_breaks, text),
        columns,
        initial_indent=head,
        subsequent_indent=hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return begin + wrapped[len(head) :].replace(_NO_BREAK, " ")


def _paths_with_spaces() -> list[str]:
    """Return the user's texts with spaces, the longest first: arguments, values of options, and folders."""
    words = [each for word in sys.argv[1:] for each in (word, word.partition("=")[2])]
    words += [os.environ.get(name, "") for name in _FOLDERS]
    with suppress(OSError):  # the current folder was deleted
        words.append(os.getcwd())
    return sorted({visible(word) for word in words if " " in word}, key=len, reverse=True)


def _without_breaks(match: re.Match[str]) -> str:
    """Keep a part on one line unless it is so long that the terminal itself would break it, without our indentation."""
    part = match[0]
    return part.replace(" ", _NO_BREAK) if len(part) <= MAX_UNBROKEN or part in _paths_with_spaces() else part
