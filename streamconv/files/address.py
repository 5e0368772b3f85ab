"""The location of a file: a path on this machine, or a URL.

A user gives either as one string. `parse_location` decides once which it is; no other code looks at its spelling.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from streamconv.display import printable
from streamconv.errors import UsageError
from streamconv.files.hub_settings import hub_url
from streamconv.files.web_pages import direct_url, page_problem
from streamconv.redaction import MIN_LENGTH, WEB, links_of, secret_user, secrets_of_user, shown_url

# RFC 3986, 3.1; at least two characters, since one is a drive on Windows. "::" chains fsspec's URLs.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::[A-Za-z])")
_MISSPELT = re.compile("https?(:(?!//)|//).*@", re.IGNORECASE)  # a URL with a password, not a path
_STORE_QUERY = re.compile(r"\?[^=/?]+=.*", re.DOTALL)  # such as s3's ?versionId=1; what?.pth is a name
_MIN_QUERY_LENGTH = 6  # shorter values of a query, such as "main", occur in any text and are not hidden
# Parameters that sign a URL (AWS, CloudFront, Google, Azure, Alibaba and others), or give access to it (GitLab).
_SIGNED_BY = {"signature", "sig", "expires", "policy", "key-pair-id", "auth_key", "hdnea", "hdnts", "verify"}
_TOKENS = {"token", "access_token", "private_token", "job_token", "api_key", "apikey", "password", "jwt"}
_SIGNED_BY_PREFIXES = ("x-amz-", "x-goog-", "x-oss-", "x-ms-", "q-sign")
_OF_BROWSERS = {"download", "dl", "raw"}  # show the file or save it: which file it is does not depend on them


@dataclass(frozen=True)
class Address:
    """The URL of a file that is read over a network.

    Neither `str` nor `repr` shows what may be secret in it: a user, a password, a query.
    """

    url: str = field(repr=False)

    @property
    def scheme(self) -> str:
        return re.split("://|::|:", self.url, maxsplit=1)[0].lower()

    @property
    def _links(self) -> list[str]:
        """The links of an fsspec chain, such as ``tar://a.pth::https://host/b.tar``; most URLs are one link."""
        return [self.url] if self.scheme in WEB else self.url.split("::")

    @property
    def name(self) -> str:
        """The file name: the last part of the path, in a chain that of the first link with a path."""
        link = next((link for link in self._links if link.partition("://")[2]), "")
        # Only http has fragments and percent-encoding; elsewhere, # and % are ordinary characters, and ? mostly is.
        is_web = link.lower().startswith(("http://", "https://"))
        path = unquote(urlsplit(link).path) if is_web else _STORE_QUERY.sub("", link.partition("://")[2])
        return path.rpartition("/")[2]

    @property
    def _query(self) -> list[tuple[str, str]]:
        """The names and values of the query, in a chain those of all links."""
        return [pair for link in links_of(self.url) for pair in _query_of(link)]

    @property
    def is_signed(self) -> bool:
        """True if the query holds a signature or a token, which may expire."""
        return any(_signs(name) or _gives_access(name) for name, _ in self._query)

    @property
    def secrets(self) -> list[str]:
        """The values to hide in text from servers and packages: user, password and the values of the query."""
        found = []
        for link in links_of(self.url):
            found += secrets_of_user(secret_user(link))
            for name, value in _query_of(link):
                length = MIN_LENGTH if _signs(name) or _gives_access(name) else _MIN_QUERY_LENGTH
                found += [value] if len(value) >= length else []
        return found

    @property
    def identity(self) -> str:
        """The part that identifies the file: the URL without user, token and signed query. It is not for display.

        A signature changes while the file stays the same, and so do the parameters that are signed; any other query,
        such as ?id=1, may choose the file.
        """
        query = [(name, value) for name, value in self._query if name.lower() not in _OF_BROWSERS | _TOKENS]
        if any(_signs(name) for name, _ in query):
            query = []
        shown = str(self)
        return f"{self.url if '://…' in shown else shown}?{urlencode(sorted(query))}"

    def beside(self, name: str) -> "Address | None":
        """Return the address of a file in the same folder; None for a ``data:`` URL, which has no folder.

        An http query is kept: it may hold the credentials for the whole folder.
        """
        return self._with_path(lambda path: f"{path.rpartition('/')[0]}/{name}")

    def inside(self, name: str) -> "Address":
        """Return the address of a file in the folder that this is the address of."""
        address = self._with_path(lambda path: f"{path.rstrip('/')}/{name}")
        assert address is not None, "a data: URL is not a folder"
        return address

    def _with_path(self, change: Callable[[str], str]) -> "Address | None":
        links = self._links
        at = next((i for i, link in enumerate(links) if link.partition("://")[2]), None)
        if at is None:
            return None
        is_web = links[at].lower().startswith(("http://", "https://"))
        path = re.split("[?#]", links[at])[0] if is_web else links[at]
        link = f"{change(path)}{links[at][len(path) :]}"
        return Address("::".join([*links[:at], link, *links[at + 1 :]]))

    def __str__(self) -> str:
        return shown_url(self.url)


def _query_of(link: str) -> list[tuple[str, str]]:
    is_web = link.lower().startswith(("http://", "https://"))  # only the web has fragments
    return parse_qsl((link.partition("#")[0] if is_web else link).partition("?")[2], keep_blank_values=True)


def _signs(parameter: str) -> bool:
    return parameter.lower() in _SIGNED_BY or parameter.lower().startswith(_SIGNED_BY_PREFIXES)


def _gives_access(parameter: str) -> bool:
    return parameter.lower() in _TOKENS or parameter.lower() == "key"  # ?key=a.pth may name a file, too


Location: TypeAlias = Path | Address

COPY_FOLDER = "Copy the folder to this machine, and give its path."


def parse_location(location: str | PathLike[str] | Address) -> Location:
    """Return an `Address` if the string begins with a scheme (``https://``), else a path.

    The address of a page about a file becomes that of the file: see `direct_url`.

    Raises:
        UsageError: it is empty, or a URL that is not valid or does not name a file.
    """
    if isinstance(location, Address):
        return location
    text = fspath(location)
    if not text:
        raise UsageError("A file's name is empty. Give a path or a URL.")
    if isinstance(location, str) and _MISSPELT.match(text):
        raise UsageError("The URL is not valid: it needs :// after its scheme. Write it as https://HOST/PATH/FILE.pth.")
    if not isinstance(location, str) or not _ADDRESS.match(text):
        return Path(text)
    if text.lower().startswith("file://"):
        host, _, path = text[len("file://") :].partition("/")
        if host not in ("", "localhost"):
            host = host.rpartition("@")[2]
            raise UsageError(
                f"{shown_url(text)} is on another machine, {host}, which file:// cannot reach. Give an https URL."
            )
        return Path(unquote(f"/{path}"))
    text = direct_url(text)
    address = Address(text)
    if not is_valid_url(text) or not text.isprintable() or not address.name.isprintable():
        raise UsageError(f"{printable(str(address))} is not a valid URL. Write it as https://HOST/PATH/FILE.pth.")
    if problem := page_problem(text):
        raise UsageError(f"{address} {problem}")
    if address.name in ("", ".", ".."):
        raise UsageError(f"{address} does not name a file. Give the URL of a .pth or .safetensors file.")
    return address


def local_path(path: str | PathLike[str], role: str, fix: str = "Give a path.") -> Path:
    """Return the path of a file or folder that must be on this machine.

    Args:
        role: What messages call it.
        fix: What they advise to do with a URL.

    Raises:
        UsageError: it is empty, a URL, or not a path.
    """
    text = fspath(path)
    if not text:
        raise UsageError(f"The {role}'s name is empty. Give a path.")
    if "\0" in text:
        raise UsageError(f"{printable(text)} cannot be the {role}: no path contains a null byte.")
    if isinstance(path, str) and _ADDRESS.match(text):
        shown = printable(str(Address(text)))
        raise UsageError(f"{shown} is a URL, and the {role} must be on this machine. {fix}")
    return Path(path)


def parse_folder(path: str | PathLike[str], role: str) -> Location:
    """Return the path of a folder, or the URL of one in a store without slashes at its end.

    Args:
        role: What messages call it.

    Raises:
        UsageError: it is empty, the URL is not valid, or it is one of the web, which has no folders.
    """
    text = fspath(path)
    if not isinstance(path, str) or not _ADDRESS.match(text) or text.lower().startswith("file://"):
        return local_path(path, role)
    address = Address(text.rstrip("/"))
    shown = printable(str(address))
    if address.scheme in (*WEB, "data") or not address.name or not text.isprintable():
        raise UsageError(f"{shown} cannot be the {role}. Give a path, or a URL such as s3://BUCKET/FOLDER.")
    return address


def is_valid_url(url: str) -> bool:
    """Return whether an http URL has a valid host and port; fsspec checks URLs with other schemes."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in WEB:
            return True
        (parts.hostname or "").encode("idna")
        return bool(parts.hostname) and parts.port != 0 and " " not in parts.netloc
    except ValueError:  # a port, a bracket or a label of the host is not valid
        return False


def hf_to_https(address: Address) -> Address:
    """Convert hf://[datasets/]OWNER/NAME[@REVISION]/FILE to the https URL of the same file.

    Raises:
        UsageError: it is not of this form, or as for `hub_url`.
    """
    endpoint = hub_url()
    from huggingface_hub import hf_hub_url

    kind, *parts = address.url.partition("://")[2].split("/")
    kinds = {"datasets": "dataset", "spaces": "space"}
    if kind not in kinds:
        kind, parts = "", [kind, *parts]
    if len(parts) < 3 or not all(parts):
        raise UsageError(
            f"{address} does not name a file in a repository. Write it as hf://OWNER/NAME[@REVISION]/FILE."
        )
    name, _, revision = parts[1].partition("@")
    if revision == "refs" and len(parts) > 4:  # refs/pr/1 and refs/convert/NAME
        revision, parts = "/".join(["refs", *parts[2:4]]), parts[:2] + parts[4:]
    file = "/".join(parts[2:])
    url = hf_hub_url(
        f"{parts[0]}/{name}", file, repo_type=kinds.get(kind), revision=unquote(revision) or None, endpoint=endpoint
    )
    return Address(url)
