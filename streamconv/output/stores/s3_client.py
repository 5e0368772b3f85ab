"""Sends requests to S3, or a store that speaks its protocol, through s3fs: with the credentials that reading uses.

s3fs and botocore would each repeat failed requests. Here, neither does: `S3Client.call` decides what is repeated and
when, and how long to wait for a store that does not respond, as for files that are read.
"""

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import wait
from io import BytesIO
from threading import Event
from time import monotonic
from typing import Any

from streamconv.display import visible
from streamconv.errors import OutputError
from streamconv.files import retries, slow
from streamconv.files.address import Address
from streamconv.logs import logger
from streamconv.output.stores.s3_errors import Failure, explained
from streamconv.output.stores.store import MAX_REASON
from streamconv.redaction import redacted

MAX_TIMEOUTS = 2  # attempts in a row without a response
MAX_READ_BYTES = 64 << 20  # only small files and records are read here
_POLL_SECONDS = 0.2

_log = logger(__name__)


class StoppedError(Exception):
    """The request was given up because its result is not wanted any more."""


class S3Client:
    """Sends requests about the bucket of an address, from any thread. After a fork, the child connects again."""

    def __init__(self, address: Address):
        self.address = address
        self._file_system: Any = None
        self._process = 0
        self.bucket, self.prefix = self._split()
        self._has_responded = False

    def _split(self) -> tuple[str, str]:
        bucket, prefix, _ = self._connected().split_path(self.address.url)
        if not bucket:
            raise OutputError(f"{self.address} names no bucket. Write it as s3://BUCKET/FOLDER.")
        return bucket, prefix.strip("/")

    def url_of(self, key: str) -> str:
        """Return the URL of an object, for messages."""
        return f"s3://{self.bucket}/{key}"

    def call(
        self,
        operation: str,
        *,
        stop: Event | None = None,
        seconds: float | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Return the response to an operation on the bucket, named as in botocore; failures are retried.

        Args:
            stop: Set to give up the request.
            seconds: How long to wait for a response while no byte of the body is sent.

        Raises:
            StoreError: the store refuses it, fails repeatedly, or does not respond.
            StoppedError: ``stop`` was set.
        """
        stop, tries, timeouts = stop or Event(), 0, 0
        waits = retries.RETRY_WAITS_SECONDS
        while True:
            tries += 1
            try:
                response = self._attempt(operation, stop, seconds or slow.RESPONSE_SECONDS / MAX_TIMEOUTS, arguments)
                self._has_responded = True
                return response
            except (StoppedError, OutputError):
                raise
            except Exception as error:  # s3fs, botocore and aiohttp have their own
                failure = Failure.of(error, self.address)
                timeouts = timeouts + 1 if isinstance(error, TimeoutError) else 0
            most = len(waits) if self._has_responded else retries.RETRIES_BEFORE_OPEN
            if not failure.may_pass or tries > most or timeouts == MAX_TIMEOUTS:
                raise explained(failure, operation, self.address, self.bucket, tries)
            pause = waits[tries - 1]
            if pause:
                _log.warning("%s: %s: %s; trying again in %g s", self.address, operation, failure.reason, pause)
            if stop.wait(pause):
                raise StoppedError

    def pages(self, operation: str, *markers: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Yield the pages of a list. ``markers`` are the parameters for the beginning of the next page."""
        page = self.call(operation, **arguments)
        yield page
        while page.get("IsTruncated"):
            page = self.call(operation, **arguments, **{name: page[f"Next{name}"] for name in markers})
            yield page

    def _attempt(self, operation: str, stop: Event, seconds: float, arguments: dict[str, Any]) -> dict[str, Any]:
        file_system, body = self._connected(), arguments.get("Body")
        if isinstance(body, BytesIO):
            body.seek(0)
        call = _response(file_system, operation, {"Bucket": self.bucket, **arguments})
        future = asyncio.run_coroutine_threadsafe(call, file_system.loop)
        sent, since = 0, monotonic()
        while not wait([future], _POLL_SECONDS).done:
            if stop.is_set():
                future.cancel()
                raise StoppedError
            if isinstance(body, BytesIO) and body.tell() != sent:
                sent, since = body.tell(), monotonic()
            if monotonic() - since > seconds:
                future.cancel()
                raise TimeoutError(f"the store did not respond to {operation} within {seconds:,.0f} s")
        return future.result()

    def _connected(self) -> Any:
        """Return s3fs's file system, which belongs to one process."""
        if self._process != os.getpid():
            self._file_system, self._process = _file_system(self.address), os.getpid()
        return self._file_system


async def _response(file_system: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the response to an operation, with the contents of an object that is read."""
    response: dict[str, Any] = await file_system._call_s3(operation, **arguments)
    if operation == "get_object":
        async with response["Body"] as body:
            if response["ContentLength"] > MAX_READ_BYTES:
                raise OutputError(
                    f"{arguments['Key']} has {response['ContentLength']:,} bytes, too many for a small file."
                )
            response["Body"] = await body.read()
    return response


def _file_system(address: Address) -> Any:
    try:
        import s3fs
    except ModuleNotFoundError as error:
        raise OutputError(
            f"{address} needs the Python package s3fs, which is not installed. Run `pip install 'streamconv[s3]'`."
        ) from error
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    config = {
        "request_checksum_calculation": "when_required",  # some stores refuse checksums other than Content-MD5
        "response_checksum_validation": "when_required",
        "read_timeout": slow.RESPONSE_SECONDS,
        **conf.get("s3", {}).get("config_kwargs", {}),
        "retries": {"total_max_attempts": 1},
    }
    try:
        # fsspec caches file systems by configuration, so those of the caller's own code are not changed.
        file_system, _ = url_to_fs(address.url, config_kwargs=config)
    except Exception as error:
        reason = visible(redacted(f"{type(error).__name__}: {error}", address.secrets), MAX_REASON).removesuffix(".")
        raise OutputError(f"{address} cannot be written: {reason}. Check the URL and fsspec's configuration.") from None
    if not isinstance(file_system, s3fs.S3FileSystem):
        kind = type(file_system).__name__
        raise OutputError(f"{address} cannot be written: fsspec uses {kind} for it, not s3fs. Register s3fs for it.")
    file_system.retries = 1
    return file_system
