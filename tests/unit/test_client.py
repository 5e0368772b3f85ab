"""Servers and proxies that do not answer as they should: one message that names the cause, without any secret."""

import base64
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from streamconv import NetworkError
from streamconv.files import retries
from streamconv.files.address import Address
from streamconv.files.http import HttpFile
from streamconv.files.proxies import find_proxy


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_WAITS_SECONDS", (0, 0, 0, 0))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def failure(url: str) -> str:
    with pytest.raises(NetworkError) as caught:
        HttpFile(Address(url))
    return str(caught.value)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "407 Proxy Authentication Required"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "502 Bad Gateway"),
        (b"HTTP/1.1 403 you sent Basic {sent}\r\n\r\n", "403 you sent Basic ***"),
    ],
)
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "ALL_PROXY"])
def test_proxy_that_opens_no_tunnel_is_named_with_its_reason(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, variable: str, answer: bytes, reason: str
) -> None:
    sent = base64.b64encode(b"someone:p4ssw0rd")
    proxy = urlsplit(serve(lambda: [(answer.replace(b"{sent}", sent), 0)])).netloc
    monkeypatch.setenv(variable, f"http://someone:p4ssw0rd@{proxy}")
    message = failure("https://models.invalid/x.pth")
    assert f"cannot connect through the proxy 127.0.0.1, which {variable} names (" in message
    assert f"{reason}) (tried 4 times)" in message
    assert not any(secret in message for secret in ("p4ssw0rd", sent.decode()))


def test_socks_proxy_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("socks")
    monkeypatch.setenv("ALL_PROXY", "socks5://someone:p4ssw0rd@127.0.0.1:9")
    message = failure("https://models.invalid/x.pth")
    assert "the proxy 127.0.0.1, which ALL_PROXY names (Error connecting to SOCKS5 proxy 127.0.0.1:9: " in message
    assert "Connection refused) (tried" in message
    assert "p4ssw0rd" not in message


def test_server_of_another_protocol_is_named_as_such(serve: Callable[..., str]) -> None:
    assert r"the response is not HTTP: SSH-2.0-x\r\n (tried" in failure(serve(lambda: [(b"SSH-2.0-x\r\n", 0)]))


def test_host_of_a_redirect_that_cannot_be_reached_is_named(serve: Callable[..., str]) -> None:
    answer = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: http://localhost:9/x?sig=s1gn4ture\r\n\r\n"
    message = failure(serve(lambda: [(answer, 0)]))
    assert "cannot connect to localhost (Connection refused) (tried" in message
    assert "s1gn" not in message


@pytest.mark.parametrize(
    ("url", "entry", "is_excluded"),
    [
        ("https://h.org/x", "h.org", True),
        ("https://me:word@H.org/x", " a, .H.ORG ", True),
        ("https://a.h.org/x", "*.h.org", True),
        ("https://h.org/x", "*.h.org", False),
        ("https://ah.org/x", "h.org", False),
        ("https://h.org/x", "h.org:443", True),
        ("https://h.org:443/x", "h.org:443", True),
        ("http://h.org/x", "h.org:443", False),
        ("https://h.org/x", "*", True),
        ("https://10.1.2.3:8/x", "10.0.0.0/8", True),
        ("https://11.1.2.3/x", "10.0.0.0/8, 300.0.0.0/8, x/y", False),
        ("https://10.1.2.3/x", "10.1.2.3", True),
        ("https://[::1]:8/x", "::1", True),
        ("https://[fd00::1]/x", "fd00::/8", True),
        ("https://h.org/x", "", False),
    ],
)
def test_host_that_no_proxy_names_is_reached_directly(
    monkeypatch: pytest.MonkeyPatch, url: str, entry: str, is_excluded: bool
) -> None:
    monkeypatch.setenv("ALL_PROXY", "someone:p4ssw0rd@proxy.org:1")
    monkeypatch.setenv("NO_PROXY", entry)
    assert find_proxy(urlsplit(url)) == (None if is_excluded else "http://someone:p4ssw0rd@proxy.org:1")
