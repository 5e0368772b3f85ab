"""How the Hub is asked, through huggingface_hub: quietly, not for ever, and never telling the token.

Whatever it raises becomes a `HubError` with what went wrong and the mend. The original error is no
part of it, not even as its cause: a server may have echoed the request's headers into its text.
"""

import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from streamconv._version import __version__
from streamconv.errors import HubError, StreamconvError

Answer = TypeVar("Answer")

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before the tries after the first
PATIENCE = 120.0  # seconds without a byte: huggingface_hub itself waits for ever
AGAIN = "Run the same command again: what the Hub has is not sent again."


class Hub:
    """The Hub as the user is logged in to it.

    Raises:
        HubError: there is no token.
    """

    def __init__(self) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self._token = ""
        self.endpoint = constants.ENDPOINT
        self.settings = f"{self.endpoint}/settings/tokens"
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                "HF_HUB_OFFLINE is set, so that nothing can be pushed. Unset it, or leave --push-to-hub out."
            )
        token = self.ask("No token can be had", get_token)
        if not token:
            raise HubError(
                f"There is no token to push to the Hub with. Make one that may write at {self.settings} "
                "and log in with it, hf auth login, or give it as HF_TOKEN."
            )
        self._token = token
        self.api = HfApi(token=token, library_name="streamconv", library_version=__version__)

    def ask(
        self, failed: str, function: Callable[..., Answer], /, *args: Any, is_repeated: bool = True, **kw: Any
    ) -> Answer:
        """What ``function`` of huggingface_hub answers, asked again where a fault may pass.

        Args:
            failed: Begins the message of what is raised, "x cannot be sent to y".
            is_repeated: Whether asking twice does what asking once does.

        Raises:
            HubError: it does not answer, or refuses.
        """
        for wait in (*WAITS, None) if is_repeated else (None,):
            try:
                with _quiet():
                    _limit_patience()
                    return function(*args, **kw)
            except StreamconvError:
                raise
            except Exception as error:  # of whichever HTTP library; none of them may show the token
                failure, may_pass = self._explained(failed, error)
            if wait is None or not may_pass:
                break
            time.sleep(wait)
        raise failure  # outside of the except block, so that the error is not its context

    def _explained(self, failed: str, error: Exception) -> tuple[HubError, bool]:
        """What is wrong and the mend, and whether it may pass by itself."""
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        response = next((r for e in chain if (r := getattr(e, "response", None)) is not None), None)
        status = getattr(response, "status_code", 0)
        said = next((str(s) for e in chain if (s := getattr(e, "server_message", None))), "" if status else str(error))
        said = self._without_secrets(said)
        what, mend = self._judged(status, said, {c.__name__ for e in chain for c in type(e).__mro__})
        may_pass = status in (408, 429) or status >= 500 or (not status and mend == AGAIN)
        told = f": {said.rstrip('.')}" if said and (status or mend != AGAIN) else ""
        return HubError(f"{failed}: {what}{told}. {mend}", said), may_pass

    def _judged(self, status: int, said: str, kinds: set[str]) -> tuple[str, str]:
        login = f"Make a token that may write at {self.settings} and log in with it: hf auth login, or HF_TOKEN."
        if any("Timeout" in kind for kind in kinds):
            return f"{self.endpoint} does not answer in time", AGAIN
        if not status and kinds & {"ConnectionError", "TransportError", "RequestException"}:
            return f"{self.endpoint} cannot be reached, or the line broke", AGAIN
        if status == 402 or (status in (0, 400, 403, 413, 507) and re.search("storage|quota|payment", said, re.I)):
            return "the account has no room", f"Make room there, or push to another account. {AGAIN}"
        if status == 401:
            return "the token is refused (401)", login
        if status == 403:
            return "the token may not do that (403)", login
        if status == 404:
            return "there is no such repository or revision, or the token may not see it (404)", login
        if status in (409, 412):
            return f"someone else changed the repository meanwhile ({status})", AGAIN
        if status == 429:
            return "the Hub was asked too often (429)", f"Wait some minutes. {AGAIN}"
        if status >= 500:
            return f"the Hub has a fault ({status})", AGAIN
        return f"the Hub refuses it ({status})" if status else "it failed", f"Mend that. {AGAIN}"

    def _without_secrets(self, text: str) -> str:
        """Without the token, and without the signatures of upload addresses."""
        text = text.replace(self._token, "<token>") if self._token else text
        return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", " ".join(text.split()))[:500]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without huggingface_hub's bars, beside which ours could not be read, and its log, which shows addresses."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    were_shown, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        logging.set_verbosity(logging.ERROR)
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if were_shown:
                enable_progress_bars()


def _limit_patience() -> None:
    """huggingface_hub has no setting for it: its session is httpx's from 1.0 on, and requests' before."""
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    if hasattr(session, "timeout"):
        session.timeout = PATIENCE
    else:
        session.request = partial(type(session).request, session, timeout=PATIENCE)
