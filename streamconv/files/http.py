"""A file at an http or https URL, read by range requests (RFC 9110, 14).

The first response gives the file's length and its ETag or Last-Modified (8.8). Every later response is compared with
it, so that parts of two different files are never mixed: see `versions`.
"""

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from itertools import pairwise
from time import time_ns
from typing import NoReturn
from urllib.parse import urljoin, urlsplit

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError

from streamconv.display import printable
from streamconv.errors import NoRangesError, NotACheckpointError, SourceError
from streamconv.files.address import Address, is_valid_url
from streamconv.files.base import UNVERSIONED, ByteRange, Version
from streamconv.files.client import Client, seconds_to_wait
from streamconv.files.refusals import refusal
from streamconv.files.remote import WINDOW_BYTES, PendingRange, RemoteFile
from streamconv.files.retries import RetryLater, RetryNow
from streamconv.files.versions import HttpVersion, Versions
from streamconv.logs import logger

_log = logger(__name__)

MAX_REDIRECTS = 10
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_EXPIRED = (400, 401, 403, 404, 410)  # possible responses at a signed URL that has expired
_DOWNLOAD = "Download it yourself, such as with `curl -L -o FILE URL`, and give the file."
_SAFE_REDIRECTS = {"http": ("http", "https"), "https": ("https",)}
_PIECE_BYTES = 1 << 20  # urllib3 reads into a buffer of its own: large ones cost memory, small ones many calls


class HttpFile(RemoteFile):
    """A file on an HTTP server. Opening it reads its beginning.

    ``has_ranges`` is False if the server sends only whole files; reads announced in the file's order then still
    work, in one pass. ``expected`` is the version that an earlier process has opened.

    Raises:
        SourceMissingError: it does not exist.
        NetworkError, SourceError: it cannot be fetched, or the server does not report its length.
    """

    def __init__(self, address: Address, expected: Version = ()):
        super().__init__(address)
        self.client = Client(address.url)
        self._target, self._redirects_in_a_row = address.url, 0  # the URL after redirects
        self._versions = Versions(str(address), dict(expected))
        self._linked: dict[str, str | int | None] = {}
        self._opened_ns = time_ns()
        self.has_ranges = True
        self._is_one_pass = False  # without ranges: the announced reads are in the file's order
        self._open()

    @property
    def version(self) -> dict[str, str | int | None]:
        """The ETag or Last-Modified. Without either, the time of opening, so that no conversion can be resumed."""
        found = {key: value for key, value in self.validators.items() if key not in self._linked}
        return {"etag": found["etag"]} if "etag" in found else found

    @property
    def validators(self) -> dict[str, str | int | None]:
        """The ETag and the Last-Modified, as far as the server sends them; without either, as `version`.

        "linked_etag" is the Hub's own, which does not depend on the server that it redirects to.
        """
        headers = self._versions.first.validators if self._versions.first is not None else {}
        return {**(headers or {UNVERSIONED: self._opened_ns}), **self._linked}

    @property
    def is_open(self) -> bool:
        return self._versions.first is not None

    def require_unchanged(self) -> None:
        """Read one byte, since every response is compared with the first one. Copies are compared as a whole later."""
        if self.proved_by == "copy":
            return
        if self.size and self.has_ranges:
            self._read_alone(self.size - 1, 1)
        self.require_one_version()

    def require_one_version(self) -> None:
        self._versions.require_one()

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Announce the next reads, in order. If the server sends only whole files, request the rest at once.

        Raises:
            NoRangesError: the server sends only whole files, and these ranges are not in the file's order.
        """
        if self.has_ranges:
            super().prefetch(ranges)
            return
        wanted = [each for each in ranges if each.length]
        if any(one.end > other.start for one, other in pairwise(wanted)):
            raise self._no_ranges("its tensors are needed in another order than the file has")
        self._is_one_pass = True
        if wanted and not (self._pending and self._pending[0].position <= wanted[0].start):
            super().prefetch([ByteRange(wanted[0].start, self.size - wanted[0].start)])

    def close(self) -> None:
        super().close()
        self.client.close_idle()

    def _no_ranges(self, why: str) -> NoRangesError:
        return NoRangesError(
            f"{self.where} cannot be read in parts: its server sends only whole files, and {why}. "
            "Use convert or run without --stream and --dry-run, which download it first."
        )

    def _open(self) -> None:
        """Read the beginning, whose response gives the file's size."""
        beginning, buffer = PendingRange(0, WINDOW_BYTES), memoryview(bytearray(WINDOW_BYTES))
        self.size = WINDOW_BYTES
        try:
            while beginning.position < min(WINDOW_BYTES, self.size):
                self._read(beginning, buffer[beginning.position :])
        except _EmptyFile:
            self.size = 0
        finally:
            beginning.close()
        self._keep_window(0, bytes(buffer[: self.size]))

    def _request(self, wanted: ByteRange) -> "_HttpRangeResponse":
        if not self.has_ranges and not self._is_one_pass:
            raise self._no_ranges("the needed part is not at its beginning")
        headers = {"Range": f"bytes={wanted.start}-{wanted.end - 1}"}
        return _HttpRangeResponse(self, self._target, self.client.get(self._target, headers), wanted)

    def check_response(self, response: BaseHTTPResponse, url: str, wanted: ByteRange) -> None:
        """Compare a response's headers with the request and with the first response.

        Raises:
            RetryNow, RetryLater: the request has to be sent again.
            SourceError: a retry would not help.
        """
        status, headers = response.status, response.headers
        reason = f"the server answered {status} {self._shown(response.reason or '', url)}".rstrip()
        if location := response.get_redirect_location():
            target = _join(url, location)
            if not is_valid_url(target) or urlsplit(target).scheme not in _SAFE_REDIRECTS[urlsplit(url).scheme]:
                where = self._shown(str(Address(target)), url)
                raise SourceError(f"{self.where} redirects to {where}, which is not secure. Check the URL.")
            if (linked := self.client.redacted(headers.get("X-Linked-ETag", ""), url)) and not self.is_open:
                self._linked = {"linked_etag": linked}
            self._redirect(target)
        if status in _BUSY:
            raise RetryLater(reason, seconds_to_wait(response))
        if status in _EXPIRED and self.is_open and url != self.address.url:
            self._redirect(self.address.url)
        content_range = headers.get("Content-Range", "")
        if status == 416 and content_range.replace(" ", "") == "bytes*/0" and not self.is_open:
            raise _EmptyFile
        if status == 416 and self.is_open:
            raise self._versions.changed()
        if status not in (200, 206):
            raise refusal(self.address, url, response, lambda text: self.client.redacted(text, url))
        start, size = 0, response.length_remaining
        is_encoded = headers.get("Content-Encoding", "identity") != "identity"
        if (is_encoded or size is None) and headers.get("Content-Type", "").lower().startswith("text/html"):
            raise NotACheckpointError(f"{self.where} is a web page, not a file. Check the URL, or {_DOWNLOAD}")
        if is_encoded:
            raise SourceError(
                f"{self.where} is sent compressed and cannot be read in parts. Download it yourself, such as with "
                "`curl -L --compressed -o FILE URL`, and give the file."
            )
        if status == 206:
            match = re.fullmatch(r"bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", content_range.strip())
            start, end = (int(match[1]), int(match[2])) if match else (-1, -1)
            size = int(match[3]) if match and match[3] != "*" else None
            if start != wanted.start or not start <= end < min(wanted.end, end + 1 if size is None else size):
                raise SourceError(f"{self.where}: the server sent another part than requested. {_DOWNLOAD}")
        if size is None:
            raise SourceError(f"{self.where}: the server does not report its length. {_DOWNLOAD}")
        self._pin(self._version(size, headers, url), status == 206)
        if status == 200 and self.has_ranges:
            raise RetryLater("the server sent the whole file instead of a part", None)

    def _shown(self, text: str, url: str) -> str:
        return printable(self.client.redacted(text, url))

    def _version(self, size: int, headers: Mapping[str, str], url: str) -> HttpVersion:
        """Return the version that a response's headers name, without secrets that a server may echo: it is stored."""
        names = (headers.get("ETag"), headers.get("Last-Modified"))
        return HttpVersion(size, *(name and self.client.redacted(name, url) for name in names))

    def _pin(self, version: HttpVersion, is_part: bool) -> None:
        is_first = not self.is_open
        self._versions.check(version, self.proved_by)
        self._redirects_in_a_row = 0
        if is_first:
            self.size, self.has_ranges = version.size, is_part
            if not is_part:
                self.request_bytes = max(1, self.size)
            if not self.size:
                raise _EmptyFile

    def _redirect(self, target: str) -> NoReturn:
        self._redirects_in_a_row += 1
        if self._redirects_in_a_row > MAX_REDIRECTS:
            raise SourceError(f"{self.where} redirects more than {MAX_REDIRECTS} times in a row. Check the URL.")
        self._target = target
        _log.debug("%s redirects to %s", self.address, printable(str(Address(target))))
        raise RetryNow("redirected")


def _join(base: str, location: str) -> str:
    try:
        return urljoin(base, location)
    except ValueError:  # a bracket in the host
        return location


class _EmptyFile(Exception):
    """The file has 0 bytes."""


class _HttpRangeResponse:
    """The response to a range request for ``url``, which may not have arrived yet."""

    def __init__(self, file: HttpFile, url: str, future: "Future[BaseHTTPResponse]", wanted: ByteRange):
        self._file, self._url, self._future, self._wanted = file, url, future, wanted
        self._is_checked = False

    def readinto(self, buffer: memoryview) -> int:
        response = self._file.client.wait_for(self._future)
        try:
            if not self._is_checked:
                self._file.check_response(response, self._url, self._wanted)
                self._is_checked = True
                to_skip = 0 if self._file.has_ranges else self._wanted.start
                while to_skip:
                    to_skip -= len(response.read(min(_PIECE_BYTES, to_skip)))
            return response.readinto(buffer[:_PIECE_BYTES])
        except HTTPError as error:
            raise self._file.client.translate(error, self._url) from None
        except ValueError:  # raised by urllib3 for chunks of negative size
            raise ConnectionError("the response is not valid") from None

    def close(self) -> None:
        self._future.add_done_callback(_close)


def _close(future: "Future[BaseHTTPResponse]") -> None:
    if future.exception() is None:
        future.result().close()
