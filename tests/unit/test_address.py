"""Locations: the distinction of URLs from paths, the names of their files, and the secrets that are not shown."""

from pathlib import Path

import pytest

from streamconv import UsageError
from streamconv.files.address import Address, parse_location
from streamconv.jobs.model_options import check_options
from streamconv.jobs.options import VerificationOptions


@pytest.mark.parametrize(
    ("words", "name", "shown"),
    [
        ("https://h.org/a/x.pth", "x.pth", "https://h.org/a/x.pth"),
        ("HTTPS://h.org:8443/a%20b/x%20y.pth?sig=1#part", "x y.pth", "HTTPS://h.org:8443/a%20b/x%20y.pth"),
        ("http://user:word@h.org/x.pth", "x.pth", "http://h.org/x.pth"),
        ("http://[::1]:80/x.pth", "x.pth", "http://[::1]:80/x.pth"),
        ("s3://bucket/a/x#1%20.pth", "x#1%20.pth", "s3://bucket/a/x#1%20.pth"),
        ("abfs://user:word@h/x.pth?sv=word", "x.pth", "abfs://h/x.pth"),
        ("ftp://user:word@h/x.pth", "x.pth", "ftp://h/x.pth"),
        ("tar://a/s.pth::http://u:word@h/x.tar?sig=word", "s.pth", "tar://a/s.pth::http://h/x.tar"),
        ("simplecache::https://h/a%20b.pth?sig=word", "a b.pth", "simplecache::https://h/a%20b.pth"),
        ("hf://owner/name@v1/x.pth", "x.pth", "hf://owner/name@v1/x.pth"),
    ],
)
def test_url_gives_the_file_name_and_hides_secrets(words: str, name: str, shown: str) -> None:
    address = parse_location(words)
    assert isinstance(address, Address)
    assert (address.name, str(address)) == (name, shown)
    assert "word" not in repr(address)


@pytest.mark.parametrize("words", ["x.pth", "a/b.pth", "C:/x.pth", "http:/x.pth", "./https://x", Path("s3://a/b")])
def test_everything_else_is_a_path(words: str | Path) -> None:
    assert parse_location(words) == Path(words)


def test_file_url_is_a_path() -> None:
    assert (
        parse_location("file:///tmp/a%20b?c#d.pth")
        == parse_location("file://localhost/tmp/a b?c#d.pth")
        == Path("/tmp/a b?c#d.pth")
    )
    with pytest.raises(UsageError, match="on another machine, other"):
        parse_location("file://other/x.pth")
    with pytest.raises(UsageError, match=r"^file://other/x\.pth is on another machine, other, ") as caught:
        parse_location("file://user:word@other/x.pth?sig=word")
    assert "word" not in str(caught.value)


NO_FILES = ["https://", "https:///x.pth", "https://h:port/x.pth", "https://h/", "https://h", "https://h/.."]
NO_FILES += ["https://h/a%00b", "https://h/a\x1b[31m", "https://[::1/x.pth", "s3://", "s3://bucket/"]
NO_FILES += ["http://h:99999/x.pth", "http://a..b/x.pth", f"http://{'a' * 70}/x.pth", "http://a b/x.pth"]
NO_FILES += ["http://user:pass/word@h/x.pth", "http://h:99999/x.pth?sig=word", "https://user:word@h:x/x.pth?sig=word"]
NO_FILES += ["http://user:word@[::1/x.pth", "http://h/x\x1b.pth?sig=word"]


@pytest.mark.parametrize("words", ["http:/user:word@h/x.pth", "https:user:word@h/x.pth", "HTTP//user:word@h/x.pth"])
def test_misspelt_url_is_not_taken_for_a_path(words: str) -> None:
    with pytest.raises(UsageError, match="it needs :// after its scheme") as caught:
        parse_location(words)
    assert "word" not in str(caught.value)


@pytest.mark.parametrize("words", [*NO_FILES, "https://user:word@:1/x.pth"])
def test_url_without_a_file_is_refused_without_showing_secrets(words: str) -> None:
    with pytest.raises(UsageError, match=r"is not a valid URL|does not name a file") as caught:
        parse_location(words)
    assert str(caught.value).isprintable()
    assert "word" not in str(caught.value)


def test_url_where_a_file_must_be_on_this_machine_is_not_shown_with_its_secrets() -> None:
    for option in ({"report": "http://user:word@h/x.html"}, {"image": "s3://user:word@b/x.png"}):
        with pytest.raises(UsageError) as caught:
            check_options(VerificationOptions(**option), runs_models=False)
        assert "word" not in str(caught.value)
