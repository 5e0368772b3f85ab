"""Where a file is: a path of this machine, or an address elsewhere."""

import re
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from streamconv.checkpoint.limits import shown
from streamconv.errors import UsageError

# RFC 3986, 3.1; two characters at least, since one is a drive of Windows.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Address:
    """Of a file that is read over a network. What may be secret of it is never shown: a user, a password, a query."""

    url: str = field(repr=False)

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """The file's own name, the last part of the path."""
        return unquote(self._path).rpartition("/")[2]

    @property
    def _path(self) -> str:
        # Only http knows queries and fragments; elsewhere ? and # are parts of names.
        return urlsplit(self.url).path if self.scheme in ("http", "https") else self.url.partition("://")[2]

    def __str__(self) -> str:
        if self.scheme not in ("http", "https"):
            return self.url
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


Place: TypeAlias = Path | Address


def place_of(words: str | PathLike[str] | Address) -> Place:
    """What a user's words mean: an address where they begin with a scheme (``https://``), else a path.

    Raises:
        UsageError: it is an address that names no file.
    """
    if isinstance(words, Address):
        return words
    text = fspath(words)
    if not isinstance(words, str) or not _ADDRESS.match(text):
        return Path(text)
    if text.lower().startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    address = Address(text)
    try:
        is_valid = address.scheme not in ("http", "https") or bool(urlsplit(text).hostname and urlsplit(text).port != 0)
    except ValueError:  # of a port or a bracket
        is_valid = False
    if not is_valid or not text.isprintable() or not address.name.isprintable():
        raise UsageError(f"{shown(text.rpartition('@')[2])} is no valid address. Give https://HOST/PATH/FILE.pth.")
    if address.name in ("", ".", ".."):
        raise UsageError(f"{address} names no file. Give the address of a .pth or .safetensors file.")
    return address
