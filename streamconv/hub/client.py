"""Calls to the Hub through huggingface_hub: quiet, with a timeout, and without ever showing the token.

Everything that huggingface_hub raises becomes a `HubError` that says what went wrong and how to fix it.
The original exception is dropped, even as a cause: a server may have echoed the request's headers into it.
"""

import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

from streamconv._version import __version__
from streamconv.errors import HubError, StreamconvError

Result = TypeVar("Result")

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry
TIMEOUT_SECONDS = 120.0  # without receiving a byte; by default, huggingface_hub waits forever
RUN_AGAIN = "Run the same command again: files that the Hub already has are not uploaded again."


class HubClient:
    """The Hub, with the user's token.

    Raises:
        HubError: there is no token, or huggingface_hub is in offline mode.
    """

    def __init__(self) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self._token = ""
        self.endpoint = constants.ENDPOINT
        self.token_settings = f"{self.endpoint}/settings/tokens"
        if constants.HF_HUB_OFFLINE:
            raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, or omit --push-to-hub.")
        token = self.call("The token cannot be read", get_token)
        if not token:
            raise HubError(
                f"There is no token for pushing to the Hub. Create one with write access at {self.token_settings}, "
                "then log in with `hf auth login` or set HF_TOKEN."
            )
        self._token = token
        self.api = HfApi(token=token, library_name="streamconv", library_version=__version__)

    def call(
        self, failure: str, function: Callable[..., Result], /, *args: Any, is_repeatable: bool = True, **kwargs: Any
    ) -> Result:
        """Call a function of huggingface_hub, and retry after transient errors.

        Args:
            failure: The beginning of the error message, such as "x cannot be uploaded to y".
            is_repeatable: Calling twice has the same effect as calling once. Otherwise there is no retry.

        Raises:
            HubError: the call failed, and a retry did not help.
        """
        for delay in (*RETRY_DELAYS, None) if is_repeatable else (None,):
            try:
                with _quiet():
                    _set_timeout()
                    return function(*args, **kwargs)
            except StreamconvError:
                raise
            except Exception as error:  # from any of several HTTP libraries; none of them may show the token
                hub_error, is_transient = self._convert(failure, error)
            if delay is None or not is_transient:
                break
            time.sleep(delay)
        raise hub_error  # outside the except block, so that the original exception does not become its context

    def _convert(self, failure: str, error: Exception) -> tuple[HubError, bool]:
        """The error to raise instead, and whether it is transient: a retry may succeed."""
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        response = next((r for e in chain if (r := getattr(e, "response", None)) is not None), None)
        status = getattr(response, "status_code", 0)
        server_messages = (str(m) for e in chain if (m := getattr(e, "server_message", None)))
        message = self._redact(next(server_messages, "" if status else str(error)))
        timeout, transport = _network_errors()
        has_timed_out = any(isinstance(e, timeout) for e in chain)
        is_network_error = not status and (has_timed_out or any(isinstance(e, transport) for e in chain))
        problem, fix = self._diagnose(status, message, has_timed_out, is_network_error)
        is_transient = is_network_error or status in (408, 429) or status >= 500
        details = f": {message.rstrip('.')}" if message and not is_network_error else ""
        return HubError(f"{failure}: {problem}{details}. {fix}", message), is_transient

    def _diagnose(self, status: int, message: str, has_timed_out: bool, is_network_error: bool) -> tuple[str, str]:
        """The problem and its fix, as text. ``status`` is 0 if the server did not respond."""
        new_token = (
            f"Create a token with write access at {self.token_settings}, then log in with `hf auth login` or set "
            "HF_TOKEN."
        )
        if has_timed_out:
            return f"{self.endpoint} does not respond in time", RUN_AGAIN
        if is_network_error:
            return f"{self.endpoint} cannot be reached, or the connection broke", RUN_AGAIN
        # There is no error code for a full account: several statuses are used, and only the message is specific.
        if status == 402 or (status in (0, 400, 403, 413, 507) and re.search("storage|quota|payment", message, re.I)):
            return "the account has no storage left", f"Free some, or push to another account. {RUN_AGAIN}"
        if status == 401:
            return "the token is not accepted (401)", new_token
        if status == 403:
            return "the token lacks the permission (403)", new_token
        if status == 404:
            return "the repository or revision does not exist, or the token has no access to it (404)", new_token
        if status in (409, 412):
            return f"someone else changed the repository at the same time ({status})", RUN_AGAIN
        if status == 429:
            return "there were too many requests (429)", f"Wait a few minutes. {RUN_AGAIN}"
        if status >= 500:
            return f"the Hub has an internal error ({status})", RUN_AGAIN
        return f"the Hub rejected the request ({status})" if status else "it failed", f"Fix that. {RUN_AGAIN}"

    def _redact(self, text: str) -> str:
        """``text`` on one line, without the token and without the signatures of upload URLs."""
        text = text.replace(self._token, "<token>") if self._token else text
        return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", " ".join(text.split()))[:500]


def _network_errors() -> tuple[tuple[type[BaseException], ...], tuple[type[BaseException], ...]]:
    """The exceptions that mean a timeout, and those that mean a broken connection.

    huggingface_hub uses requests before 1.0, then httpx, then httpx2. Its own HTTP error is derived from
    that library's, which identifies the library even if several are installed.
    """
    from huggingface_hub.errors import HfHubHTTPError

    http: Any = import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    timeout, transport = (
        (http.Timeout, http.RequestException) if http.__name__ == "requests"
        else (http.TimeoutException, http.TransportError)
    )  # fmt: skip
    return (TimeoutError, timeout), (ConnectionError, transport)


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch off huggingface_hub's progress bars, which would garble ours, and its log, which shows signed URLs."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    had_progress_bars, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        logging.set_verbosity(logging.ERROR)
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if had_progress_bars:
                enable_progress_bars()


def _set_timeout() -> None:
    """Set `TIMEOUT_SECONDS` on huggingface_hub's current session.

    `set_client_factory` (`configure_http_backend` before 1.0) could do it too, but would replace a
    factory that the calling program has installed, with its proxies and certificates.
    """
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    if hasattr(session, "timeout"):
        session.timeout = TIMEOUT_SECONDS
    else:  # requests, before huggingface_hub 1.0, takes a timeout for each request only
        session.request = partial(type(session).request, session, timeout=TIMEOUT_SECONDS)
