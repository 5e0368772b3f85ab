"""Servers that refuse a file: what they say, what it probably means, and what to do."""

import json

import pytest

from streamconv import NetworkError, NotACheckpointError, SourceError
from streamconv.files import retries
from tests import api
from tests.file_server import FileServer

SIGNED = {
    "AWS": "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires=600&X-Amz-Signature=abcdef123",
    "older AWS": "AWSAccessKeyId=KEY12345&Signature=abcdef123&Expires=1700000000",
    "CloudFront": "Policy=abcdef123&Signature=abcdef123&Key-Pair-Id=KEY12345",
    "Google": "X-Goog-Expires=600&X-Goog-Signature=abcdef123",
    "Azure": "sv=2024-01-01&se=2024-01-02&sp=r&sig=abcdef123",
}


def refused(server: FileServer, status: int, body: bytes = b"", query: str = "", **headers: str) -> str:
    """Return the message about a request that is answered with ``status``, without the address."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    server.faults.statuses, server.faults.refusal = [status], (body, names)
    with pytest.raises(SourceError) as caught:
        api.plan(f"{server.url}/o/n/resolve/v1/deep/x.pth{query and '?'}{query}")
    message = str(caught.value)
    assert message.startswith(f"{server.url}/o/n/resolve/v1/deep/x.pth cannot be fetched: the server answered {status}")
    return message.partition(" the server answered ")[2]


@pytest.mark.parametrize("signed_by", SIGNED)
@pytest.mark.parametrize("status", [400, 401, 403])
def test_refused_signed_link_has_probably_expired(server: FileServer, signed_by: str, status: int) -> None:
    message = refused(server, status, query=SIGNED[signed_by])
    assert "The signed link has probably expired: get a new one" in message
    assert "abcdef123" not in message


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "set HF_TOKEN or run `hf auth login`"),
        (403, "accept the model's terms on its page"),
        (404, "Check the URL."),
        (406, "download the file with a browser"),
        (410, "the file was removed"),
        (416, "The server cannot send parts"),
        (451, "get it from another server"),
    ],
)
@pytest.mark.parametrize("query", ["", "version=2"])
def test_refusal_without_a_signature_names_its_own_cause(
    server: FileServer, status: int, advice: str, query: str
) -> None:
    assert advice in refused(server, status, query=query)


def test_missing_signed_file_is_not_taken_for_an_expired_link(server: FileServer) -> None:
    assert "expired" not in refused(server, 404, query=SIGNED["AWS"])


@pytest.mark.parametrize(
    ("code", "status", "advice"),
    [
        ("GatedRepo", 401, "o/n is gated: accept its terms on {url}/o/n, then set HF_TOKEN or run `hf auth login`."),
        ("GatedRepo", 403, "o/n is gated: accept its terms on {url}/o/n"),
        ("RepoNotFound", 401, "There is no repository o/n, or it is private"),
        ("RepoNotFound", 404, "There is no repository o/n, or it is private"),
        ("RevisionNotFound", 404, "o/n has no revision v1: see {url}/o/n."),
        ("EntryNotFound", 404, "o/n has no file deep/x.pth at revision v1: {url}/o/n/tree/v1 lists its files."),
        ("DisabledRepo", 403, "The Hub has disabled o/n"),
    ],
)
def test_hubs_error_code_names_the_cause(server: FileServer, code: str, status: int, advice: str) -> None:
    message = refused(server, status, X_Error_Code=code, X_Error_Message="Not here")
    assert message.partition("('")[2].startswith("Not here'). ")
    assert advice.format(url=server.url) in message


def test_gated_file_of_a_mirror_with_other_urls_is_not_taken_for_an_expired_link(server: FileServer) -> None:
    server.faults.statuses, server.faults.refusal = [401], (b"", {"X-Error-Code": "GatedRepo"})
    with pytest.raises(SourceError, match=r"401 Unauthorized\. It is gated: .*`hf auth login`"):
        api.plan(f"{server.url}/x.pth?{SIGNED['AWS']}")


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"error": "Access to model o/n is restricted"}', "Access to model o/n is restricted"),
        (b'{"error": {"code": 7, "message": "No\\n  quota"}}', "No quota"),
        (b'{"detail": [1], "message": "Not found"}', "Not found"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>A &amp; B</Message></Error>", "A & B"),
        (b"\xef\xbb\xbfexpired\r\n", "expired"),
        (b"See https://me:pass@host/x?sig=abcdef", "See https://host/x"),
        (json.dumps({"error": "e" * 900}).encode(), "e" * 199 + "…"),
    ],
)
def test_servers_own_words_are_shown_if_they_are_short(server: FileServer, body: bytes, shown: str) -> None:
    assert refused(server, 403, body).startswith(f"403 Forbidden ('{shown}'). ")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<!doctype html><html><title>403</title><p>no</p></html>",
        b"plain text with <b>marks</b>",
        b"p" * 201,
        b"\x1b[31mred",
        b"{not json",
        b'{"error": 7}',
        b"[" * 4000,
        b"\x00\x01\x02",
    ],
)
def test_pages_and_control_characters_are_not_shown(server: FileServer, body: bytes) -> None:
    assert refused(server, 403, body, query=SIGNED["AWS"]).startswith("403 Forbidden. ")


def test_wrong_password_in_the_url_is_named(server: FileServer) -> None:
    server.faults.statuses, server.faults.refusal = [401], (b"who is someone:secretword?", {})
    with pytest.raises(
        SourceError, match=r"401 Unauthorized .* Check the user and the password in the URL\."
    ) as caught:
        api.plan(f"{server.url}/x.pth".replace("http://", "http://someone:secretword@"))
    assert "secretword" not in str(caught.value)


def test_limit_of_requests_names_the_time_to_wait(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    server.faults.statuses, server.faults.retry_after = [429] * 10, "3600"
    with pytest.raises(NetworkError, match=r"429 Too Many Requests .*It asks to wait 3,600 s: run the same command"):
        api.plan(f"{server.url}/x.pth")


@pytest.mark.parametrize("how", [{"length": False, "ranges": False}, {"headers": {"Content-Encoding": "gzip"}}])
def test_web_page_that_cannot_be_read_in_parts_is_named(server: FileServer, how: dict[str, object]) -> None:
    (server.folder / "x.pth").write_text("<!doctype html><title>Log in</title>")
    for name, value in how.items():
        setattr(server.faults, name, value)
    server.faults.headers = {**server.faults.headers, "Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(NotACheckpointError, match=r"x\.pth is a web page, not a file"):
        api.plan(f"{server.url}/x.pth")


def test_part_of_a_file_of_unknown_length_is_refused_with_the_reason(server: FileServer) -> None:
    (server.folder / "x.pth").write_bytes(bytes(1000))
    server.faults.total = False
    with pytest.raises(SourceError, match=r"does not report its length\. Download it yourself.*curl -L -o FILE URL"):
        api.plan(f"{server.url}/x.pth")
