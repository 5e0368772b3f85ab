"""No secret leaks, for any form of an address, if servers and stores repeat everything that they were sent.

Messages, tracebacks, logs and stored records contain no secret, and no other host receives one.
"""

import base64
import json
import logging
import threading
import traceback
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import streamconv
from streamconv import NotACheckpointError, StreamconvError
from streamconv.files import retries
from streamconv.files.address import Address, parse_location
from streamconv.files.client import _authorization
from streamconv.files.open import open_file
from streamconv.files.remote import RemoteFile
from tests.unit.test_redaction import PASSWORD, QUOTED, SIGNATURE, URLS, USER

TOKEN = "hf_tokenOfTheUser123"
PROXY = "pr0xyword"
SECRETS = (USER, PASSWORD, QUOTED, SIGNATURE, TOKEN, PROXY)
SECRETS += tuple(base64.b64encode(each.encode()).decode() for each in (f"{USER}:{PASSWORD}", f"{USER}:{PROXY}", TOKEN))
STATUSES = (200, 206, 300, 302, 400, 401, 403, 404, 407, 410, 416, 418, 429, 500, 503)


def require_no_secret(*texts: str) -> None:
    for secret in SECRETS:
        assert not any(secret.lower() in text.lower() for text in texts), (secret, texts)


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)[-1:]) + str(error) + repr(error) + repr(vars(error))


class Echo(BaseHTTPRequestHandler):
    """Answers with the status at the end of the path; everything else in the response repeats the request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        sent = [value for name, value in self.headers.items() if "authorization" in name.lower()]
        decoded = [base64.b64decode(value[6:]).decode() for value in sent if value.startswith("Basic ")]
        echo = " ".join([f"you sent {self.path}", *sent, *decoded, *(value.partition(" ")[2] for value in sent)])
        status, _, how = urlsplit(self.path).path.rpartition("/")[2].partition("-")
        if how == "line":
            self.wfile.write(f"HTTP {echo}\r\n\r\n".encode())
            self.close_connection = True
            return
        body = {"json": json.dumps({"error": echo}), "text": echo, "cut": "x"}.get(how, "").encode()
        self.send_response(int(status), echo)
        where = f"ftp://{USER}:{QUOTED}@h/{sent[-1] if sent else ''}?{SIGNATURE}"
        for name in ("ETag", "Last-Modified", "X-Error-Message", "Set-Cookie", "X-Linked-ETag", "X-Error-Code"):
            if how != "text" or not name.startswith("X-"):
                self.send_header(name, "GatedRepo" if name == "X-Error-Code" else echo)
        if status == "302":
            self.send_header("Location", where)
        if status == "206":
            self.send_header("Content-Range", "bytes 0-3/4" if how != "range" else f"bytes {echo}")
        self.send_header("Content-Length", str(4 if status == "206" and how != "range" else len(body)))
        self.end_headers()
        self.wfile.write(b"none" if status == "206" and how != "cut" else body)
        self.close_connection = True


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def failure(url: str) -> BaseException:
    with pytest.raises(StreamconvError) as caught:
        streamconv.plan(url)
    return caught.value


@pytest.mark.parametrize("how", ["json", "text", "line", "cut", "range"])
@pytest.mark.parametrize("sent", ["password", "token", "proxy"])
def test_server_that_repeats_the_request_reveals_nothing(
    echo: str, how: str, sent: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "streamconv")
    user, host = f"{USER}:{QUOTED}@" if sent == "password" else "", echo
    if sent == "token":
        monkeypatch.setenv("HF_ENDPOINT", f"http://{echo}")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    if sent == "proxy":
        monkeypatch.setenv("http_proxy", f"http://{USER}:{PROXY}@{echo}")
        monkeypatch.setenv("no_proxy", "")
        host = "models.invalid"
    for status in STATUSES:
        error = failure(f"http://{user}{host}/o/n/resolve/v1/{status}-{how}?sig={SIGNATURE}&id=1")
        assert f"http://{host}/o/n/resolve/v1/{status}-{how}" in str(error)
        require_no_secret(shown(error))
        assert error.__cause__ is None
    require_no_secret(caplog.text)


@pytest.mark.parametrize("how", ["json", "text"])
def test_saved_response_that_echoes_secrets_is_described_without_them(
    echo: str, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file is copied before it is recognised if its server sends only whole files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = f"http://{USER}:{QUOTED}@{echo}/200-{how}?sig={SIGNATURE}"
    with pytest.raises(NotACheckpointError, match="you sent /200-") as caught:
        streamconv.convert(url, tmp_path / "out")
    require_no_secret(shown(caught.value))


def test_stored_version_contains_no_echoed_secret(echo: str) -> None:
    address = parse_location(f"http://{USER}:{QUOTED}@{echo}/206-x?sig={SIGNATURE}")
    with closing(open_file(address)) as file:
        assert isinstance(file, RemoteFile)
        assert file.validators.keys() == {"etag", "last_modified"}
        require_no_secret(repr(file.ref), repr(file.validators), str(file.ref.location))


STORES = [url for url in URLS if not url.lower().startswith(("http", "hf")) and "@" in url]


@pytest.mark.parametrize("url", STORES)
@pytest.mark.parametrize("kind", [ImportError, ValueError, RuntimeError, PermissionError])
def test_package_for_a_store_that_names_the_address_reveals_nothing(
    url: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(given: str) -> Any:
        raise kind(f"cannot open {given!r}, ({given}): {' '.join(Address(url).secrets)}")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    error = failure(url)
    assert URLS[url] in str(error)
    assert error.__cause__ is None
    require_no_secret(shown(error))


HUB = "https://huggingface.co"
OTHERS = [
    "http://huggingface.co/x", "https://huggingface.co:8443/x", "https://cdn.huggingface.co/x", "https://huggingface.co./x",
    "https://huggingface.co.evil.org/x", "https://evil.org/huggingface.co", "https://huggingface.co@evil.org/x",
    "https://huggingface.co\\@evil.org/x", "https://huggingface.co\\.evil.org/x", "https://evilhuggingface.co/x",
    "https://huggingfаce.co/x", "https://hf.co/x", "ftp://huggingface.co/x",
]  # fmt: skip


@pytest.mark.parametrize("url", OTHERS)
def test_credentials_are_sent_to_their_own_host_only(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for endpoint in (HUB, "HTTPS://HuggingFace.co:443/"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        origin = urlsplit(f"{HUB}/x".replace("://", f"://{USER}:{QUOTED}@"))
        assert _authorization(urlsplit(f"{HUB}/y"), urlsplit(HUB)) == {"Authorization": f"Bearer {TOKEN}"}
        assert _authorization(urlsplit(url), urlsplit(HUB)) == _authorization(urlsplit(url), origin) == {}
