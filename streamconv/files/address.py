"""Where a file is: a path of this machine, or an address elsewhere."""

import re
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from streamconv.errors import SourceError, UsageError, printable

# RFC 3986, 3.1; two characters at least, since one is a drive of Windows. "::" chains fsspec's addresses.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::[A-Za-z])")
_WEB = ("http", "https")


@dataclass(frozen=True)
class Address:
    """Of a file that is read over a network. What may be secret of it is never shown: a user, a password, a query."""

    url: str = field(repr=False)

    @property
    def scheme(self) -> str:
        return re.split("://|::|:", self.url, maxsplit=1)[0].lower()

    @property
    def _links(self) -> list[str]:
        """Of fsspec's chains; most addresses are one."""
        return [self.url] if self.scheme in _WEB else self.url.split("::")

    @property
    def name(self) -> str:
        """The file's own name, the last part of the path; of a chain, of the first link that has one."""
        link = next((link for link in self._links if link.partition("://")[2]), "")
        # Only http knows queries and fragments; elsewhere ? and # are parts of names, and % is itself.
        is_web = link.lower().startswith(("http://", "https://"))
        path = unquote(urlsplit(link).path) if is_web else link.partition("://")[2]
        return path.rpartition("/")[2]

    def __str__(self) -> str:
        return "::".join(map(_shown, self._links))


def _shown(url: str) -> str:
    """Without a query, and without a user before the host; hf://OWNER/NAME@REVISION has none."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = re.split("[?#]" if scheme.lower() in _WEB else "[?]", rest)[0].partition("/")
    return scheme + mark + host.rpartition("@")[2] + slash + path


Location: TypeAlias = Path | Address


def parse_location(words: str | PathLike[str] | Address) -> Location:
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
        host, _, path = text[len("file://") :].partition("/")
        if host not in ("", "localhost"):
            raise UsageError(f"{text} is on another machine, {host}. Give an address that is served.")
        return Path(unquote(f"/{path}"))
    address = Address(text)
    if not is_valid_url(text) or not text.isprintable() or not address.name.isprintable():
        raise UsageError(f"{printable(text.rpartition('@')[2])} is no valid address. Give https://HOST/PATH/FILE.pth.")
    if address.name in ("", ".", ".."):
        raise UsageError(f"{address} names no file. Give the address of a .pth or .safetensors file.")
    return address


def is_valid_url(url: str) -> bool:
    """Whether an http address has a host and, if any, a port; others are for fsspec to judge."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in _WEB:
            return True
        (parts.hostname or "").encode("idna")
        return bool(parts.hostname) and parts.port != 0 and " " not in parts.netloc
    except ValueError:  # of a port, a bracket, or a label of the host
        return False


def hub_file_url(address: Address) -> Address:
    """hf://[datasets/]OWNER/NAME[@REVISION]/FILE as an https address.

    Raises:
        UsageError: it is not of this form.
    """
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise SourceError(f"HF_HUB_OFFLINE is set, so that {address} is not asked for. Unset it, or name a file.")
    kind, *parts = address.url.partition("://")[2].split("/")
    kinds = {"datasets": "dataset", "spaces": "space"}
    if kind not in kinds:
        kind, parts = "", [kind, *parts]
    if len(parts) < 3 or not all(parts):
        raise UsageError(f"{address} names no file of a repository. Write hf://OWNER/NAME[@REVISION]/FILE.")
    name, _, revision = parts[1].partition("@")
    if revision == "refs" and len(parts) > 4:  # refs/pr/1 and refs/convert/NAME
        revision, parts = "/".join(["refs", *parts[2:4]]), parts[:2] + parts[4:]
    file = "/".join(parts[2:])
    url = hf_hub_url(f"{parts[0]}/{name}", file, repo_type=kinds.get(kind), revision=unquote(revision) or None)
    return Address(url)
