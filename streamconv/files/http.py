"""A file behind an http or https address, read by ranges.

The file is pinned by its length and its ETag (or Last-Modified) as the first answer says them; every
later answer must say the same (RFC 9110, 8.8 and 14).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPResponse
from itertools import pairwise
from time import time, time_ns
from typing import NoReturn
from urllib.parse import urljoin, urlsplit

from streamconv.errors import ChangedError, NoRangesError, SourceError, SourceMissingError, printable
from streamconv.files.address import Address, is_valid_url
from streamconv.files.base import ByteRange
from streamconv.files.connections import connect, request
from streamconv.files.remote import BROKEN, WINDOW_BYTES, PendingRange, RemoteFile, RetryLater, RetryNow

MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_EXPIRED = (400, 401, 403, 404, 410)  # what a signed address answers when its time is over
_MENDS = {
    401: "It needs a token: for the Hub, set HF_TOKEN or run `hf auth login`; else download it yourself.",
    403: "You may not read it: on the Hub, accept the model's terms on its page, and check what your token may do.",
    404: "Check the address.",
    410: "Check the address.",
}
_SKIP_BYTES = 64 << 10


@dataclass(frozen=True)
class _Version:
    """What stays the same as long as the file does."""

    size: int
    etag: str | None
    modified: str | None

    def as_dict(self) -> dict[str, str | int | None]:
        return {"etag": self.etag} if self.etag else {"last_modified": self.modified} if self.modified else {}


class HttpFile(RemoteFile):
    """Opened by reading its beginning.

    ``target`` is the address that redirects have led to, ``idle`` are connections that lead to its host.

    Raises:
        SourceMissingError: there is none.
        NetworkError, SourceError: it cannot be had, or nothing says how long it is.
    """

    def __init__(self, address: Address, notify: Callable[[str], None]):
        super().__init__(address, notify)
        self.target, self._hops = address.url, 0  # where redirects led, and how many in a row
        self.idle: list[HTTPConnection] = []
        self._version: _Version | None = None
        self._opened_ns = time_ns()
        self.has_ranges = True
        self._is_one_pass = False  # what is read of a file without ranges is announced, and in its order
        self._open()

    @property
    def version(self) -> dict[str, str | int | None]:
        """Where nothing tells one version from another, when it was opened: what was begun is not gone on with then."""
        said = self._version.as_dict() if self._version is not None else {}
        return said or {"opened_ns": self._opened_ns}

    @property
    def modified(self) -> str | None:
        """When the server says that the file was last changed: RFC 9110, 8.8.2."""
        return self._version.modified if self._version is not None else None

    @property
    def is_open(self) -> bool:
        return self._version is not None

    def require_unchanged(self) -> None:
        """Ask for one byte, since every answer is held against the first one."""
        if self.size and self.has_ranges:
            self._read_alone(self.size - 1, 1)

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """
        Raises:
            NoRangesError: the server sends only whole files, and these ranges are not in the file's order.
        """
        if self.has_ranges:
            super().prefetch(ranges)
            return
        wanted = [each for each in ranges if each.length]
        if any(one.end > other.start for one, other in pairwise(wanted)):
            raise self.no_ranges("its tensors are wanted in another order than they come")
        self._is_one_pass = True
        if wanted and not (self._flows and self._flows[0].position <= wanted[0].start):
            super().prefetch([ByteRange(wanted[0].start, self.size - wanted[0].start)])

    def close(self) -> None:
        super().close()
        self._close_idle()

    def no_ranges(self, why: str) -> NoRangesError:
        return NoRangesError(
            f"{self.where} cannot be read in parts: its server sends only whole files, and {why}. "
            "Without --stream, convert and run download it first."
        )

    def _open(self) -> None:
        """Read the beginning, whose answer says how long the file is."""
        flow, buffer, self.size = PendingRange(0, WINDOW_BYTES), memoryview(bytearray(WINDOW_BYTES)), WINDOW_BYTES
        try:
            while flow.position < min(WINDOW_BYTES, self.size):
                self._read(flow, buffer[flow.position :])
        except _Empty:
            self.size = 0
        finally:
            flow.close()
        self._keep_window(0, bytes(buffer[: self.size]))

    def _ask(self, wanted: ByteRange) -> "_HttpAnswer":
        if not self.has_ranges and not self._is_one_pass:
            raise self.no_ranges("what is needed of it is not at its beginning")
        url, is_new = urlsplit(self.target), not self.idle
        connection = connect(url) if is_new else self.idle.pop()
        try:
            request(connection, url, self.address.url, {"Range": f"bytes={wanted.start}-{wanted.end - 1}"})
        except BROKEN as error:
            connection.close()
            raise (error if is_new else self.stale()) from error
        return _HttpAnswer(self, connection, is_new, wanted)

    def stale(self) -> RetryNow:
        """The server closed a line that had been waiting: so it did with the others."""
        self._close_idle()
        return RetryNow("the line was closed")

    def _close_idle(self) -> None:
        while self.idle:
            self.idle.pop().close()

    def check_response(self, response: HTTPResponse, wanted: ByteRange) -> None:
        """Hold an answer's headers against what was asked, and against the first answer's.

        Raises:
            RetryNow, RetryLater: ask again.
            SourceError: it does not help to.
        """
        status = response.status
        if status in _REDIRECTS and response.getheader("Location"):
            target = _joined(self.target, response.getheader("Location") or "")
            if not is_valid_url(target) or (_scheme(self.target), _scheme(target)) not in _SAFE_STEPS:
                where = printable(str(Address(target)))
                raise SourceError(f"{self.where} leads to {where}, which is no safe line. Check the address.")
            self._redirect(target)
        if status in _BUSY:
            raise RetryLater(f"the server answers {status} {printable(response.reason)}", _seconds_to_wait(response))
        if status in _EXPIRED and self.is_open and self.target != self.address.url:
            self._redirect(self.address.url)
        content_range = response.getheader("Content-Range") or ""
        if status == 416 and content_range.replace(" ", "") == "bytes*/0" and not self.is_open:
            raise _Empty
        if status == 416 and self.is_open:
            raise self._changed()
        if status not in (200, 206):
            kind = SourceMissingError if status in (404, 410) else SourceError
            mend = _MENDS.get(status, "Check the address, or download the file yourself.")
            raise kind(f"{self.where} cannot be had: the server answers {status} {printable(response.reason)}. {mend}")
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise SourceError(f"{self.where} comes compressed, which cannot be read in parts. Download it yourself.")
        start, size = 0, response.length
        if status == 206:
            match = re.fullmatch(r"bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18})", content_range.strip())
            start, end, size = map(int, match.groups()) if match else (-1, -1, None)
            if start != wanted.start or size is None or not start <= end < min(wanted.end, size):
                raise SourceError(f"{self.where}: the server sends another part than was asked. Download it yourself.")
        if size is None:
            raise SourceError(f"{self.where}: the server does not say how long it is. Download it yourself.")
        self._pin(_Version(size, response.getheader("ETag"), response.getheader("Last-Modified")), status == 206)
        if status == 200 and self.has_ranges:
            raise RetryLater("the server sends the whole file instead of a part", None)

    def _pin(self, version: _Version, is_part: bool) -> None:
        if self._version is None:
            self._version, self.size, self.has_ranges = version, version.size, is_part
            if not is_part:
                self.request_bytes = max(1, self.size)
            if not self.size:
                raise _Empty
        elif (version.size, version.as_dict()) != (self.size, self._version.as_dict()):
            raise self._changed()
        self._hops = 0

    def _redirect(self, target: str) -> NoReturn:
        self._hops += 1
        if self._hops > MAX_REDIRECTS:
            raise SourceError(f"{self.where} leads in circles: {MAX_REDIRECTS} redirects in a row. Check the address.")
        self._close_idle()  # they may lead to another host
        self.target = target
        raise RetryNow("redirected")

    def _changed(self) -> ChangedError:
        return ChangedError(
            f"{self.where} was changed while it was read: the server has another file there now. "
            "Delete what was begun, and run again."
        )


def _joined(base: str, location: str) -> str:
    try:
        return urljoin(base, location)
    except ValueError:  # of a bracket
        return location


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


_SAFE_STEPS = {("http", "http"), ("http", "https"), ("https", "https")}


class _Empty(Exception):
    """The file has no byte."""


class _HttpAnswer:
    """A range on its way, on a connection of its own until the last byte is read."""

    def __init__(self, file: HttpFile, connection: HTTPConnection, is_new: bool, wanted: ByteRange):
        self._file, self._connection, self._is_new, self._wanted = file, connection, is_new, wanted
        self._target = file.target
        self._response: HTTPResponse | None = None
        self._left = wanted.length

    def readinto(self, buffer: memoryview) -> int:
        response = self._response or self._begin()
        count = response.readinto(buffer[: self._left])
        self._left -= count
        is_free = not self._left and response.isclosed()
        if is_free and self._file.target == self._target:  # else it leads to a host that secrets may not be for
            self._file.idle.append(self._connection)
        return count

    def close(self) -> None:
        if self._connection not in self._file.idle:
            self._connection.close()

    def _begin(self) -> HTTPResponse:
        try:
            response = self._connection.getresponse()
        except BROKEN as error:
            raise (error if self._is_new else self._file.stale()) from error
        self._file.check_response(response, self._wanted)
        skipped = 0 if self._file.has_ranges else self._wanted.start
        while skipped:
            skipped -= len(response.read(min(_SKIP_BYTES, skipped))) or _broken()
        self._response = response
        return response


def _broken() -> int:
    raise ConnectionError("the line was closed")


def _seconds_to_wait(response: HTTPResponse) -> float | None:
    """What Retry-After says: seconds, or a date (RFC 9110, 10.2.3)."""
    text = response.getheader("Retry-After") or ""
    try:
        return float(text) if text.isdecimal() else max(0.0, parsedate_to_datetime(text).timestamp() - time())
    except (ValueError, OverflowError):
        return None
