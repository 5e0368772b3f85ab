"""Decides how long to wait before a retry, and when to give up."""

import time

from streamconv.display import visible
from streamconv.errors import NetworkError
from streamconv.files.address import Address
from streamconv.logs import logger
from streamconv.redaction import redacted

_log = logger(__name__)

# Before each retry, until enough bytes arrive. The first is for a connection that the server closed while it was idle.
RETRY_WAITS_SECONDS = (0, 1, 2, 4, 8, 16, 30, 30)
MAX_SHORT_RESPONSES = 100  # broken responses in a row that together gave less than `ENOUGH_BYTES`
ENOUGH_BYTES = 30_000  # as many as the slowest accepted server sends in `slow.WINDOW_SECONDS`
MAX_REASON = 300  # characters of what went wrong, which may quote a server
RETRIES_BEFORE_OPEN = 3  # while no request has succeeded yet: the URL may be wrong


class RetryNow(OSError):
    """Raised to send the request again at once, although nothing broke. The code that raises it limits the repeats."""


class RetryLater(OSError):
    """Raised if the server asks to send the request again later: after ``seconds``, or None if it gives no time."""

    def __init__(self, reason: str, seconds: float | None):
        super().__init__(reason)
        self.seconds = seconds


class Retries:
    """Counts the failed requests for a file since a byte arrived, and since `ENOUGH_BYTES` arrived.

    The second limit is for a server that sends one byte in response to each request, forever.
    """

    def __init__(self, address: Address):
        self.failures, self._short, self._bytes = 0, 0, 0
        self._where, self._secrets = str(address), address.secrets

    def received(self, count: int, *, is_complete: bool) -> None:
        """Count bytes that arrived; ``is_complete``: they are the last ones of a request's range."""
        self.failures, self._bytes = 0, self._bytes + count
        if is_complete or self._bytes >= ENOUGH_BYTES:
            self._short = self._bytes = 0

    def wait(self, error: OSError, position: int | None) -> None:
        """Wait before the next attempt. ``position`` is the offset to resume at, None if the file is not open yet.

        Raises:
            NetworkError: there have been too many attempts.
        """
        if isinstance(error, RetryNow):
            return
        reason = visible(redacted(str(error), self._secrets) or type(error).__name__, MAX_REASON)
        is_short = self._short == MAX_SHORT_RESPONSES
        if is_short or self.failures == (RETRIES_BEFORE_OPEN if position is None else len(RETRY_WAITS_SECONDS)):
            problem, fix = "cannot be opened", "Check the URL and the network, and run the same command again."
            if position is not None:
                problem = f"cannot be read at byte {position:,}"
                fix = "Run the same command again when the connection is back; it resumes from there."
            if isinstance(error, RetryLater) and error.seconds:
                fix = f"It asks to wait {error.seconds:,.0f} s: run the same command again after that."
            tries = (self._short if is_short else self.failures) + 1
            raise NetworkError(f"{self._where} {problem}: {reason} (tried {tries} times). {fix}") from None
        seconds: float = RETRY_WAITS_SECONDS[self.failures]
        if isinstance(error, RetryLater) and error.seconds is not None:
            seconds = max(seconds, min(error.seconds, RETRY_WAITS_SECONDS[-1]))
        self.failures, self._short = self.failures + 1, self._short + 1
        if seconds:
            _log.warning("%s: %s; trying again in %g s", self._where, reason, seconds)
            time.sleep(seconds)
