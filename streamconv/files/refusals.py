"""Explains why a server refused a request, and what to do about it."""

import html
import json
import re
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError

from streamconv.display import printable, shortened
from streamconv.errors import RefusedError, SourceError, SourceMissingError
from streamconv.files.address import Address
from streamconv.files.error_json import error_message

_MAX_BODY_BYTES = 4096
_MAX_SHOWN = 200  # characters of the server's own text

_ADVICE = {
    401: "It needs a token: for the Hub, set HF_TOKEN or run `hf auth login`; otherwise download it yourself.",
    403: "You have no access: on the Hub, accept the model's terms on its page, and check your token's permissions.",
    404: "Check the URL.",
    406: "The server refuses programs: download the file with a browser, and give the file.",
    407: "Set the proxy's user and password: http://USER:PASSWORD@HOST:PORT.",
    410: "Check the URL: the file was removed from there.",
    416: "The server cannot send parts of a file: download it yourself, and give the file.",
    451: "The server may not send the file to your country: get it from another server.",
}
_KINDS = {401: RefusedError, 403: RefusedError, 404: SourceMissingError, 410: SourceMissingError}
_EXPIRED = "The signed link has probably expired: get a new one from the page that you got it from."
_GATED = "It is gated: accept the terms on the page of its repository, then set HF_TOKEN or run `hf auth login`."
_WRONG_PASSWORD = "Check the user and the password in the URL."
_HUB_ADVICE = {  # by the Hub's X-Error-Code
    "GatedRepo": "{repository} is gated: accept its terms on {page}, then set HF_TOKEN or run `hf auth login`.",
    "RepoNotFound": "There is no repository {repository}, or it is private: check its name, or set HF_TOKEN or run "
    "`hf auth login`.",
    "RevisionNotFound": "{repository} has no revision {revision}: see {page}.",
    "EntryNotFound": "{repository} has no file {file} at revision {revision}: {page}/tree/{revision} lists its files.",
    "DisabledRepo": "The Hub has disabled {repository}: see {page}.",
}
_HUB_FILE = re.compile(r"(.*?/)((?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def refusal(address: Address, url: str, response: BaseHTTPResponse, redact: Callable[[str], str]) -> SourceError:
    """Return the error for a response that refuses a request: not a file, a redirect or a request to wait.

    ``address`` is the file's, ``url`` the one that answered, after redirects, ``redact`` hides what was sent to it.
    """
    status, own_text = response.status, _own_text(response, redact)
    reason = f"{status} {printable(redact(response.reason or ''))}".rstrip()
    kind = _KINDS.get(status, SourceError)
    quoted = f" ('{own_text}')" if own_text else ""
    advice = _hub_advice(url, response, redact) or _advice(status, address)
    return kind(f"{address} cannot be fetched: the server answered {reason}{quoted}. {advice}")


def _advice(status: int, address: Address) -> str:
    if status in (400, 401, 403) and address.is_signed:
        return _EXPIRED
    if status == 401 and urlsplit(address.url).username is not None:
        return _WRONG_PASSWORD
    return _ADVICE.get(status, "Check the URL, or download the file yourself.")


def _hub_advice(url: str, response: BaseHTTPResponse, redact: Callable[[str], str]) -> str:
    parts = urlsplit(url)
    match = _HUB_FILE.fullmatch(parts.path)
    advice = _HUB_ADVICE.get(response.headers.get("X-Error-Code", ""))
    if match is None:
        return _GATED if response.headers.get("X-Error-Code") == "GatedRepo" else ""
    if advice is None:
        return ""
    root, repository, revision, file = (printable(redact(unquote(part))) for part in match.groups())
    page = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{root}{repository}"
    return advice.format(repository=repository, revision=revision, file=file, page=page)


def _own_text(response: BaseHTTPResponse, redact: Callable[[str], str]) -> str:
    """Return the server's own text as one short line without secrets; empty if there is none, or only a web page."""
    text = response.headers.get("X-Error-Message") or _message(_body(response))
    line = redact(" ".join(text.split()))
    return shortened(line, _MAX_SHOWN) if line.isprintable() else ""


def _body(response: BaseHTTPResponse) -> str:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return ""
    try:
        return response.read(_MAX_BODY_BYTES).decode("utf-8-sig", errors="replace").strip()
    except (HTTPError, OSError):
        return ""


def _message(body: str) -> str:
    """Return the message in a body of JSON, XML or plain text."""
    if body.startswith(("{", "[")):
        return _json_message(body)
    if body.startswith("<"):
        found = re.search(r"<message>([^<]{1,1000})</message>", body, re.IGNORECASE)
        return html.unescape(found[1]) if found is not None else ""
    return body if len(body) <= _MAX_SHOWN and "<" not in body else ""


def _json_message(body: str) -> str:
    try:
        return error_message(json.loads(body))
    except (ValueError, RecursionError):
        return ""
