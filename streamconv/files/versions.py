"""Decides whether the responses to requests for parts of a file belong to one version of it.

Behind a CDN, several servers may send one file, each with an ETag or a Last-Modified of its own for the same
bytes. So a response of another version does not prove a change: the request is sent again, until the version that was
read first answers. If it does not come back, CRC-32s can still prove the bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from streamconv.display import printable
from streamconv.errors import ChangedError
from streamconv.files.base import is_same_version
from streamconv.files.retries import RetryNow
from streamconv.logs import logger

_log = logger(__name__)

MAX_OTHERS_IN_A_ROW = 20  # if two servers answer at random, one of them does so 20 times in a row once in a million

ProvedBy = Literal["version", "records", "copy"]
"""The proof that all bytes that are read belong to one file.

"version": every response must be of the first one's version. "records": the reader compares whole records with their
CRC-32s; other versions are accepted if the first one does not come back, but parts of records are not proved then.
"copy": a complete copy will be compared with all CRC-32s; other versions are accepted.
"""


@dataclass(frozen=True)
class HttpVersion:
    """A version by a response's headers: the ``size`` in bytes, the ETag and the Last-Modified (RFC 9110, 8.8)."""

    size: int
    etag: str | None = None
    modified: str | None = None

    @property
    def validators(self) -> dict[str, str | int | None]:
        headers = {"etag": self.etag, "last_modified": self.modified}
        return {name: value for name, value in headers.items() if value}

    def __str__(self) -> str:
        if self.etag:
            return f"ETag {printable(self.etag)}"
        return f"Last-Modified {printable(self.modified)}" if self.modified else "none"


class Versions:
    """The versions of the responses for one file. ``first`` is the first one, which the reader continues with.

    ``expected`` is the version to begin with, if an earlier process has read one; see `is_same_version`.
    """

    def __init__(self, where: str, expected: Mapping[str, str | int | None]):
        self._where, self._expected = where, expected
        self.first: HttpVersion | None = None
        self._other: HttpVersion | None = None  # the last one that was not the first
        self._others_in_a_row = 0
        self._servers_disagree = False  # the first one has come back after another one, or there are more than two
        self._is_mixed = False

    def check(self, version: HttpVersion, proved_by: ProvedBy) -> None:
        """Compare the version of a response with the first one.

        Raises:
            RetryNow: it is another one, which the next response may not be.
            ChangedError: the file was changed, or its servers disagree and nothing else proves the bytes.
        """
        if self.first is None:
            if self._expected.keys() & version.validators.keys():
                self._retry_unless(is_same_version(self._expected, version.validators))
            self.first, self._others_in_a_row = version, 0
            return
        if version.size != self.first.size:
            raise self.changed()
        if is_same_version(version.validators, self.first.validators):
            self._servers_disagree |= self._other is not None
            self._others_in_a_row = 0
            return
        self._servers_disagree |= self._other not in (None, version)
        self._other = version
        self._retry_unless(False)
        if proved_by == "version":
            raise self._mixed()
        if not self._is_mixed:
            _log.info("%s: %s and %s are of one size; CRC-32s will tell", self._where, self.first, version)
        self._is_mixed = True

    def require_one(self) -> None:
        """Raise `ChangedError` if responses of several versions were accepted."""
        if self._is_mixed:
            raise self._mixed()

    def changed(self) -> ChangedError:
        return ChangedError(
            f"{self._where} was changed while it was read: the server now has another file there. "
            "Delete the unfinished output, and run again."
        )

    def _mixed(self) -> ChangedError:
        if not self._servers_disagree:
            return self.changed()
        return ChangedError(
            f"{self._where} cannot be read in parts: its servers disagree about its version ({self.first}, "
            f"{self._other}). Download it with `curl -L -o FILE URL`, or `hf download` from the Hub, and give the file."
        )

    def _retry_unless(self, is_expected: bool) -> None:
        if not is_expected and self._others_in_a_row < MAX_OTHERS_IN_A_ROW:
            self._others_in_a_row += 1
            raise RetryNow("another version")
