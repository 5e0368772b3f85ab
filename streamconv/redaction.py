"""Removes secrets from URLs and from the text of servers and packages, for all code that shows or stores them.

Two methods complement each other. By form: a URL or a chain of URLs loses its user, password, query and fragment, and
anything that looks like a token or a header with credentials is hidden. By value: the secrets that were sent to a
server are hidden in its responses, also percent-encoded, in base64 or in another case.
"""

import base64
import os
import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus, unquote, urlsplit

from streamconv.display import shortened

HIDDEN = "***"
MAX_SEARCHED = 20_000  # characters of a text that are searched for secrets; the rest is dropped
MAX_TEXT = 2_000  # characters of it that are returned: messages show 500 at most
SHORT = 8  # shorter values are hidden only if they are whole words: "main" is not hidden in "domain"
MIN_LENGTH = 4  # shorter values occur in any text, so they are not hidden on their own

WEB = ("http", "https")
# Between the links of one of fsspec's chains, such as zip://a.pth::simplecache::https://h/b.zip, but not in [::1].
_BETWEEN_LINKS = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*(?:://|::|$))")
_HOST = re.compile(r"(?:\[[^\]@]*\]|[^:@\[\]]*)(?::\d*)?")
_TOKEN = r"hf_[A-Za-z0-9]{16,}|gh[oprsu]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
_IS_TOKEN = re.compile(rf"{_TOKEN}|[0-9a-f]{{40}}")
# Schemes in which the part before the @ names the file: github://OWNER:NAME@REVISION, abfs://CONTAINER@ACCOUNT.
_NAMES = {"github": re.compile(r"[\w.-]+:[\w.-]+")} | dict.fromkeys(
    ("abfs", "abfss", "az", "wasb", "wasbs", "zip", "tar", "libarchive", "memory"), re.compile(r"[^:]+")
)
_SECRET_VARIABLE = re.compile(
    r".*(TOKEN|SECRET|PASSWORD|PASSWD|(ACCESS|API|ACCOUNT|SAS)_?KEY|CONNECTION_STRING)", re.IGNORECASE
)
_PROXY_VARIABLE = re.compile(r".*_proxy|HF_ENDPOINT", re.IGNORECASE)

_BY_FORM = re.compile(
    r"""
    (?P<data>\bdata:[\w.+-]{0,80}/?[\w.+-]{0,80}(?:;[\w.+=-]{1,80}){0,5},)[^\s"'<>]*
    | (?P<url>(?:[A-Za-z][A-Za-z0-9+.-]{0,30}::)*[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s"<>`]*)
    | (?P<encoded>[A-Za-z][A-Za-z0-9+.-]{0,30}(?::|%(?:25){0,9}3A)(?:\\{0,9}/|%(?:25){0,9}2F){2})[^\s"<>`]*
    | (?P<cookie>\b(?:set-)?cookie["']?\s{0,9}[:=]).*
    | (?P<header>\bauthorization["']?\s{0,9}[:=]\s{0,9}["']?(?:[A-Za-z]{1,20}\s{1,9})?)[^\s"',;]+
    | (?P<scheme>\b(?:bearer|basic)\s{1,9})(?=\S{0,200}[\d_+/=])[\w.~+/=-]{8,}
    | (?P<name>\b[\w-]{0,40}(?:token|password|passwd|secret|signature|api_?key|\bsig|\bjwt)=)[^\s&"'<>]+
    | (?P<query>\?(?=[^\s?=]{1,80}=))[^\s"'<>]*
    | (?P<user>[^\s/:@"'<>()\[\]]{1,100}:[^\s/@"'<>]{1,200}@)(?=[\w\[])
    | (?P<token>\b(?:"""
    + _TOKEN
    + r"""))
    """,
    re.VERBOSE | re.IGNORECASE,
)
_KEPT = ("data", "encoded", "cookie", "header", "scheme", "name")  # these are shown, and what follows is hidden


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """Return the text of a server or a package, such as an error message, without anything that may be secret.

    Args:
        secrets: What was sent to the server. It is hidden in addition to the secrets in environment variables.
    """
    text = text[:MAX_SEARCHED]
    known = (*(each for each in secrets if len(each) >= MIN_LENGTH), *_environment_secrets())
    values = sorted({*_with_base64(known)}, key=len, reverse=True)
    for value in _occurring(values, text):
        text = _pattern(value).sub(HIDDEN, text)
    decoded = _decoded(text)
    if decoded != text and any(_pattern(value).search(decoded) for value in _occurring(values, decoded)):
        return HIDDEN  # a secret is in it in an encoding that cannot be cut out
    return _BY_FORM.sub(_shown, shortened(text, MAX_TEXT))


def shown_url(url: str) -> str:
    """Return a URL, or a chain of URLs, without users, passwords, queries and fragments.

    >>> shown_url("zip://a.pth::https://user:password@host/b.zip?sig=abc")
    'zip://a.pth::https://host/b.zip'
    """
    return "::".join(map(_shown_link, links_of(url)))


def shown_argument(word: str) -> str:
    """Return an argument of the command line without secrets. A URL in it is taken to end where the argument ends."""
    match = re.search(r"[A-Za-z][A-Za-z0-9+.-]*(://|::[A-Za-z])", word)
    if match is not None:
        return word[: match.start()] + shown_url(word[match.start() :])
    return _BY_FORM.sub(_shown, word) if word.lower().startswith("data:") else word


def links_of(url: str) -> list[str]:
    """Return the URLs of a chain; for most URLs, only the URL itself."""
    return _BETWEEN_LINKS.split(url)


def secret_user(link: str) -> str:
    """Return the user and password of a URL as they are written in it; empty if it has none."""
    scheme, _, rest = link.partition("://")
    user, _, _ = re.split("[?#]" if scheme.lower() in WEB else "[?]", rest)[0].partition("/")[0].rpartition("@")
    names = _NAMES.get(scheme.lower())
    is_name = names is not None and names.fullmatch(user) and not any(map(_IS_TOKEN.fullmatch, user.split(":")))
    return "" if is_name else user


def secrets_of_user(user: str) -> list[str]:
    """Return the texts to hide for the ``user:password`` of a URL: both, their base64 as it is sent, and each alone."""
    plain = ":".join(map(unquote, user.partition(":")[::2])) if ":" in user else unquote(user)
    name, _, password = plain.partition(":")
    pairs = [user, plain, base64.b64encode(plain.encode()).decode()] if password else []
    return [*pairs, *(part for part in {name, password, *user.split(":")} if len(part) >= MIN_LENGTH)]


def _shown_link(link: str) -> str:
    scheme, mark, rest = link.partition("://")
    if not mark:
        return link if scheme.startswith("data:") else link.partition("?")[0]
    whole_authority = rest.partition("/")[0]
    authority, slash, path = re.split("[?#]" if scheme.lower() in WEB else "[?]", rest)[0].partition("/")
    host = authority.rpartition("@")[2]
    # A "/", "?" or "#" in a password ends the host too early: what follows may be the rest of the password.
    if not _HOST.fullmatch(host) or "@" in whole_authority.removeprefix(authority):
        return f"{scheme}://…"
    return f"{scheme}://{authority.removeprefix(secret_user(link)).removeprefix('@')}{slash}{path}"


def _shown(match: re.Match[str]) -> str:
    kind = match.lastgroup
    if kind == "url":
        url = match[0].rstrip("'),.;:!?]}|\\")
        if url.endswith("://") or ("[" in url and "]" not in url):
            url = match[0]
        return shown_url(url) + match[0][len(url) :]
    if kind in ("query", "user"):
        return ""
    return f"{match[kind]}{HIDDEN}" if kind in _KEPT else HIDDEN


def _occurring(values: Iterable[str], text: str) -> list[str]:
    """Return the values that may occur in a text; this is faster than searching for their patterns."""
    folded = text.casefold()
    return [value for value in values if value.casefold() in folded]


def _pattern(value: str) -> re.Pattern[str]:
    found = re.escape(value)
    return re.compile(found if len(value) >= SHORT else rf"(?<![^\W_]){found}(?![^\W_])", re.IGNORECASE)


def _with_base64(values: Iterable[str]) -> Iterator[str]:
    """Yield the values as they are, percent-encoded and, if they are long enough, as they appear inside any base64."""
    for value in values:
        yield from {value, quote(value, safe=""), quote(value), quote_plus(value)}
        for before in range(3):  # bytes before it, of a group of three
            data = base64.b64encode(bytes(before) + value.encode()).decode()
            part = data[(before * 8 + 5) // 6 : (before + len(value.encode())) * 8 // 6]
            if len(part) >= SHORT:
                yield from {part, part.replace("+", "-").replace("/", "_")}


def _decoded(text: str) -> str:
    import html  # has large tables, and only a text with secrets needs it

    for _ in range(3):  # a server may encode an echo of an encoded text
        text = re.sub(r"\\(?:u00|x)([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), text, flags=re.IGNORECASE)
        text = html.unescape(unquote(text)).replace("\\/", "/")
    return text


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= SHORT and _SECRET_VARIABLE.fullmatch(name):
            yield value
        elif "@" in value and _PROXY_VARIABLE.fullmatch(name):
            yield from secrets_of_user(
                urlsplit(value if "://" in value else f"http://{value}").netloc.rpartition("@")[0]
            )
