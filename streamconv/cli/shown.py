"""The user's command line as messages, logs and reports show it: quoted, and without secrets."""

import os
import shlex

from streamconv.display import visible
from streamconv.redaction import shown_argument


def shown_command(arguments: list[str]) -> str:
    """Return the command line without the parts of URLs that may be secret: users, passwords, queries."""
    return " ".join(["streamconv", *(_quoted(shown_argument(word)) for word in arguments)])


def command_to_resume(arguments: list[str]) -> str:
    """Return the command line, with a note if secrets had to be left out, so that it cannot be pasted as it is."""
    is_whole = all(shown_argument(word) == word for word in arguments)
    note = "" if is_whole else "  (with the full URLs; parts that may be secret are not shown here)"
    return f"{shown_command(arguments)}{note}"


def _quoted(word: str) -> str:
    """Quote a word for a shell, so that it can be shown and pasted.

    A word with invisible characters becomes $'…' of bash and zsh, with the bytes of all but letters, digits and ASCII
    as hexadecimal escapes.
    """
    if visible(word, len(word) + 1) == word:
        return shlex.quote(word)
    return f"$'{''.join(c if _is_plain(c) else _as_bytes(c) for c in word)}'"


def _is_plain(character: str) -> bool:
    return character not in "\\'" and (character.isascii() or character.isalnum()) and visible(character) == character


def _as_bytes(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
