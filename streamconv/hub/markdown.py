"""Writes text from files into Markdown, so that it is shown as it is and never becomes markup."""

import re

from streamconv.display import visible

MAX_LENGTH = 500  # characters of one text
_MARKUP = re.compile(
    r"[\\`*{}\[\]<>|#~$&@]"  # Markdown's and GitHub's punctuation, and TeX's
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # but not within a word, where it is not markup
    r"|:(?=//)|(?<=www)\."  # in an address, which would become a link
    r"|^[-+=]|(?<=^\d)[.)](?= |$)",  # at the start, where it begins a list or underlines a heading
    re.IGNORECASE,
)


def as_code(text: object) -> str:
    """Return ``text`` as code for a paragraph or a table cell, whatever characters it has."""
    return f"`{re.sub(r'[`| ]+', ' ', visible(str(text), MAX_LENGTH)).strip() or ' '}`"


def as_text(text: object) -> str:
    """Return ``text`` for a paragraph or a table cell: on one line, with markup escaped."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(visible(str(text), MAX_LENGTH).split()))
