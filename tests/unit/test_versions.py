"""Versions of a file on its servers: which headers name the same one, and what several of them mean."""

from collections.abc import Mapping

import pytest

from streamconv import ChangedError
from streamconv.files.base import is_same_version
from streamconv.files.retries import RetryNow
from streamconv.files.versions import MAX_OTHERS_IN_A_ROW, HttpVersion, ProvedBy, Versions


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ({"etag": '"a"'}, {"etag": '"a"'}, True),
        ({"etag": '"a"'}, {"etag": 'W/"a"'}, True),
        ({"etag": '"a-gzip"'}, {"etag": '"a"'}, True),
        ({"etag": '"a--gzip"'}, {"etag": '"a;br"'}, True),
        ({"etag": '"a-5"'}, {"etag": '"a"'}, False),  # S3's number of parts
        ({"etag": '"a"', "last_modified": "Mon"}, {"etag": '"a"', "last_modified": "Tue"}, True),
        ({"etag": '"a"', "last_modified": "Mon"}, {"etag": '"b"', "last_modified": "Mon"}, False),
        ({"etag": '"a"', "last_modified": "Mon"}, {"last_modified": "Mon"}, True),
        ({"etag": '"a"', "last_modified": "Mon"}, {"last_modified": "Tue"}, False),
        ({"etag": '"a"'}, {"last_modified": "Mon"}, False),
        ({"etag": '"a"'}, {}, False),
        ({}, {}, True),
        ({"linked_etag": "h", "etag": '"a"'}, {"linked_etag": "h", "etag": '"b"'}, True),
        ({"linked_etag": "h", "etag": '"a"'}, {"linked_etag": "i", "etag": '"a"'}, False),
        ({"linked_etag": "h", "etag": '"a"'}, {"etag": '"a"'}, True),
        ({"opened_ns": 1}, {"opened_ns": 2}, False),
        ({"key": "k"}, {"key": "k"}, True),
        ({"key": "k"}, {"etag": "k"}, False),
    ],
)
def test_version_is_named_by_the_etag_or_else_the_time(
    one: Mapping[str, str | int | None], other: Mapping[str, str | int | None], is_same: bool
) -> None:
    assert is_same_version(one, other) == is_same_version(other, one) == is_same


def versions(*, first: str = "a", expected: Mapping[str, str | int | None] = {}) -> Versions:
    found = Versions("h/x", expected)
    found.check(HttpVersion(10, first), "version")
    return found


def ask(found: Versions, etag: str, proved_by: ProvedBy = "version", size: int = 10) -> int:
    """Ask until a response is accepted or refused; return how often it was asked again."""
    for repeats in range(100):
        try:
            found.check(HttpVersion(size, etag), proved_by)
        except RetryNow:
            continue
        return repeats
    raise AssertionError("asked for ever")


def test_other_version_is_asked_for_again_and_then_refused_as_a_change() -> None:
    found = versions()
    assert ask(found, "a") == 0
    with pytest.raises(ChangedError, match="was changed while it was read"):
        ask(found, "b")
    found.require_one()


def test_other_version_is_refused_as_a_disagreement_if_the_first_one_has_come_back() -> None:
    found = versions()
    with pytest.raises(RetryNow):
        found.check(HttpVersion(10, "b"), "version")
    assert ask(found, "a") == 0
    with pytest.raises(ChangedError, match=r"its servers disagree about its version \(ETag a, ETag b\)"):
        ask(found, "b")


@pytest.mark.parametrize("proved_by", ["records", "copy"])
def test_other_version_is_accepted_at_last_if_checksums_prove_the_bytes(proved_by: ProvedBy) -> None:
    found = versions()
    assert ask(found, "b", proved_by) == MAX_OTHERS_IN_A_ROW
    assert ask(found, "b", proved_by) == 0
    with pytest.raises(ChangedError):
        found.require_one()


def test_other_size_is_always_a_change() -> None:
    with pytest.raises(ChangedError, match="was changed"):
        ask(versions(), "a", "copy", size=11)


def test_first_version_is_the_expected_one_if_any_server_has_it() -> None:
    found = Versions("h/x", {"etag": "b"})
    with pytest.raises(RetryNow):
        found.check(HttpVersion(10, "a"), "version")
    found.check(HttpVersion(10, "b"), "version")
    assert found.first == HttpVersion(10, "b")
    assert ask(Versions("h/x", {"etag": "c"}), "a") == MAX_OTHERS_IN_A_ROW
    assert ask(Versions("h/x", {"opened_ns": 1}), "a") == 0
