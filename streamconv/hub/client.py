"""Calls to the Hub through huggingface_hub, with retries, and without ever showing the token.

Everything that huggingface_hub raises becomes a `HubError` that says what went wrong and how to fix it.
The original exception is dropped, even as a cause: a server may have echoed the request's headers into it.
"""

import re
import time
from collections.abc import Callable, Iterator
from inspect import signature
from json import JSONDecodeError
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from streamconv._version import __version__
from streamconv.display import shortened
from streamconv.errors import HubError, StreamconvError
from streamconv.files.hub_settings import hub_endpoint, hub_token, hub_url
from streamconv.hub import transport
from streamconv.hub.transport import NoAnswerError, in_time, network_errors, timeout_errors
from streamconv.logs import logger
from streamconv.redaction import redacted, shown_url

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_log = logger(__name__)

Result = TypeVar("Result")

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry
RUN_AGAIN = "Run the same command again: files that the Hub already has are not uploaded again."
NOT_THE_HUB = "Check HF_ENDPOINT, your proxy, and whether your network wants you to log in."

# Two failures can only be told by the Hub's text: their statuses are those of other failures, too, they have no error
# code, and huggingface_hub has no exceptions for them.
FULL_ACCOUNT = re.compile("storage|quota|payment", re.IGNORECASE)
MISSING_UPLOAD = re.compile("pointer pointed to a file that does not exist", re.IGNORECASE)
NO_STORAGE = ("the account has no storage left", f"Free some, or push to another account. {RUN_AGAIN}")


class HubClient:
    """The Hub, with the user's token.

    Raises:
        HubError: there is no token, or huggingface_hub is in offline mode.
    """

    def __init__(self) -> None:
        url = hub_url()
        from huggingface_hub import HfApi, constants

        self._token = ""
        self.endpoint = shown_url(url)  # for messages
        self.token_settings = f"{self.endpoint}/settings/tokens"
        if constants.HF_HUB_OFFLINE:
            raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.")
        token = hub_token()
        if not token:
            raise HubError(
                f"There is no token for pushing to the Hub. Create one with write access at {self.token_settings}, "
                "then log in with `hf auth login` or set HF_TOKEN."
            )
        self._token = token
        self.api = HfApi(endpoint=url, token=token, library_name="streamconv", library_version=__version__)

    def call(
        self,
        failure: str,
        function: Callable[..., Result],
        /,
        *args: Any,
        is_repeatable: bool = True,
        is_upload: bool = False,
        **kwargs: Any,
    ) -> Result:
        """Call a function of huggingface_hub, and retry after transient errors.

        Args:
            failure: The beginning of the error message, such as "x cannot be uploaded to y".
            is_repeatable: Calling twice has the same effect as calling once. Otherwise there is no retry.
            is_upload: It sends large files, which has no time limit. Any other call must end within `ANSWER_SECONDS`.

        Raises:
            HubError: the call failed, and a retry did not help.
        """
        for delay in (*RETRY_DELAYS, None) if is_repeatable else (None,):
            try:
                return function(*args, **kwargs) if is_upload else _in_time(function, *args, **kwargs)
            except StreamconvError:
                raise
            except Exception as error:  # of any type, since none may show the token
                hub_error, is_transient = self._convert(failure, error)
            if delay is None or not is_transient:
                break
            _log.warning("%s; trying again in %g s", failure, delay)
            time.sleep(delay)
        raise hub_error  # outside the except block, so that the original exception does not become its context

    def whoami(self) -> dict[str, Any]:
        """Return the Hub's answer about the token's user, with a "name" that is a string.

        Raises:
            HubError: the token is not accepted, or the response is not from the Hub.
        """
        failure = "The token cannot be used"
        user = self.call(failure, self.api.whoami, is_repeatable=False)
        if not isinstance(user, dict) or not isinstance(user.get("name"), str):
            raise HubError(f"{failure}: {self.endpoint} does not answer like the Hub. {NOT_THE_HUB}")
        return user

    def forbids_writing(self, repo_id: str) -> bool:
        """Return whether the Hub answers that the token may not write to an existing repository.

        False does not mean that it may: older versions of huggingface_hub cannot ask, and the answer may get lost.
        """
        from huggingface_hub.errors import HfHubHTTPError

        if "write" not in signature(self.api.auth_check).parameters:
            return False
        try:
            _in_time(self.api.auth_check, repo_id, write=True)
        except Exception as error:  # of any type: only this answer is of interest
            return any(
                isinstance(each, HfHubHTTPError) and each.response is not None and each.response.status_code == 403
                for each in _causes(error)
            )
        return False

    def _convert(self, failure: str, error: Exception) -> tuple[HubError, bool]:
        """The error to raise instead, and whether it is transient: a retry may succeed."""
        message, problem, fix, is_transient = self._explain(error, list(_causes(error)))
        details = f": {message.rstrip('.')}" if message else ""
        return HubError(f"{failure}: {problem}{details}. {fix}".rstrip(), message), is_transient

    def _explain(self, error: Exception, causes: "list[BaseException]") -> tuple[str, str, str, bool]:
        """Return the Hub's own message, what went wrong, how to fix it, and whether a retry may succeed."""
        from huggingface_hub.errors import HfHubHTTPError

        from streamconv.files.client import environment_problem  # imports urllib3, which only an error needs

        # Before 1.0, a HfHubHTTPError without a response is a download that failed without one.
        rejections = [e for e in causes if isinstance(e, HfHubHTTPError) and e.response is not None]
        if any(isinstance(each, NoAnswerError) for each in causes):
            problem = f"the Hub did not send a complete response within {transport.ANSWER_SECONDS:,.0f} s"
            return "", problem, RUN_AGAIN, False
        if rejections:
            status = rejections[0].response.status_code
            message = self._redact(next((e.server_message for e in rejections if e.server_message), ""))
            return message, *self._diagnose(rejections[0], status, message), status in (408, 429) or status >= 500
        # Before 1.0, this one is also a network error.
        if any(isinstance(each, JSONDecodeError) for each in causes):
            return "", f"{self.endpoint} does not answer like the Hub", NOT_THE_HUB, False
        if any(isinstance(e, network_errors()) for e in causes):
            has_timed_out = any(isinstance(e, timeout_errors()) for e in causes)
            what = "does not respond in time" if has_timed_out else "cannot be reached, or the connection broke"
            reason = self._redact(str(causes[-1])) or type(causes[-1]).__name__
            return "", f"{self.endpoint} {what} ({reason})", RUN_AGAIN, True
        if found := environment_problem(hub_endpoint().hostname or ""):
            return "", found.rstrip("."), "", False  # it says how to fix it
        message = self._redact(str(error))
        problem, fix = NO_STORAGE if FULL_ACCOUNT.search(message) else ("it failed", f"Fix that. {RUN_AGAIN}")
        return message, problem, fix, False

    def _diagnose(self, rejection: "HfHubHTTPError", status: int, message: str) -> tuple[str, str]:
        """Return why the Hub rejected a request and how to fix that, as text."""
        from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

        new_token = (
            f"Create a token with write access at {self.token_settings}, then log in with `hf auth login` or set "
            "HF_TOKEN."
        )
        if status in (402, 507) or (status in (400, 403, 413) and FULL_ACCOUNT.search(message)):
            return NO_STORAGE
        match rejection:
            case GatedRepoError():
                return "access to the repository is restricted", f"Ask for access on its page. {RUN_AGAIN}"
            case RevisionNotFoundError():
                return "the revision does not exist", "Choose another --revision."
        match status:
            case 401:
                return "the token is not accepted (401)", new_token
            case 403:
                return "the token lacks the permission (403)", new_token
            case 404:
                return "the repository does not exist, or the token has no access to it (404)", new_token
            case 409 | 412:
                return f"someone else changed the repository at the same time ({status})", RUN_AGAIN
            case 429:
                return "there were too many requests (429)", f"Wait a few minutes. {RUN_AGAIN}"
        if status >= 500:
            return f"the Hub has an internal error ({status})", RUN_AGAIN
        return f"the Hub rejected the request ({status})", f"Fix that. {RUN_AGAIN}"

    def _redact(self, text: str) -> str:
        """``text`` on one line, without the token and without the signatures of upload URLs."""
        return shortened(redacted(" ".join(text.split()), [self._token]), 500)


def _in_time(function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    started = monotonic()
    return in_time(lambda: function(*args, **kwargs), lambda: started)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes: huggingface_hub wraps the failure of an upload in a RuntimeError."""
    while error is not None:
        yield error
        error = error.__cause__
