"""Calls fsspec's file systems: one call at a time, for a limited time, with their errors explained."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from streamconv.display import visible
from streamconv.errors import OutputError, StreamconvError
from streamconv.files import retries, slow
from streamconv.files.address import Address
from streamconv.logs import logger
from streamconv.output.stores.store import MAX_REASON, StoreError
from streamconv.redaction import redacted

_log = logger(__name__)

Result = TypeVar("Result")


class FsspecClient:
    """A file system of fsspec, and a thread that calls it. ``root`` is the path of the address in it."""

    def __init__(self, address: Address):
        self.address = address
        self.file_system, self.root = _file_system(address)
        self._threads = ThreadPoolExecutor(1, "fsspec")

    def path(self, name: str) -> str:
        """Return the path of a file; the root's if the name is empty."""
        return f"{self.root}/{name}" if name else self.root

    def submit(self, function: Callable[..., Result], *args: object) -> "Future[Result]":
        """Call a function in the thread, after the earlier ones."""
        return self._threads.submit(function, *args)

    def result(self, future: "Future[Result]", length: int) -> Result:
        """Return the result of a call that sends ``length`` bytes.

        Raises:
            StoreError: it failed, or took longer than it would at `slow.MIN_STORE_RATE`.
        """
        seconds = slow.RESPONSE_SECONDS + length / slow.MIN_STORE_RATE
        if not wait([future], seconds).done:
            raise StoreError(
                f"{self.address} cannot be written: its store did not respond within {seconds:,.0f} s. Check the "
                "network, and run the same command again; complete files are kept."
            )
        try:
            return future.result()
        except StreamconvError:
            raise
        except Exception as error:  # each store's package has its own exceptions
            raise self._explained(error) from None

    def call(self, function: Callable[..., Result], *args: object) -> Result:
        """Call a function in the thread; errors as for `result`."""
        return self.result(self.submit(function, *args), 0)

    def repeat(self, function: Callable[..., Result], *args: object) -> Result:
        """Call a function that may be called again, a few times until it succeeds; errors as for `result`."""
        for pause in retries.RETRY_WAITS_SECONDS[: retries.RETRIES_BEFORE_OPEN]:
            try:
                return self.call(function, *args)
            except StoreError as error:
                if not error.code:
                    raise
                _log.warning("%s Trying again in %g s.", error, pause)
            time.sleep(pause)
        return self.call(function, *args)

    def _explained(self, error: Exception) -> StoreError:
        """Return the error for a failed call. Its code is empty if the same call would fail again."""
        name, first_line = type(error).__name__, str(error).partition("\n")[0]  # Azure's errors quote the response
        reason = visible(redacted(f"{name}: {first_line}", self.address.secrets), MAX_REASON).removesuffix(".")
        if isinstance(error, NotImplementedError):
            return StoreError(f"{self.address} cannot be written: fsspec only reads {self.address.scheme}:// URLs.")
        if isinstance(error, PermissionError):
            return StoreError(f"{self.address} cannot be written: {reason}. Check your credentials and their rights.")
        if isinstance(error, FileNotFoundError):
            return StoreError(f"{self.address} cannot be written: {reason}. Create the bucket, or check the URL.")
        advice = "Check the URL, the network and your credentials, and run the same command again."
        return StoreError(f"{self.address} cannot be written: {reason}. {advice}", name)


def _file_system(address: Address) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        file_system, root = url_to_fs(address.url)
    except Exception as error:  # each store's package has its own exceptions
        reason = visible(redacted(str(error), address.secrets), MAX_REASON).removesuffix(".")
        raise OutputError(f"{address} cannot be written: {reason}.") from None
    return file_system, str(root).rstrip("/")
