"""huggingface_hub's HTTP library and its settings: everything that depends on huggingface_hub's version.

It uses requests before 1.0, httpx in 1.x and httpx2 since 2.0. `set_client_factory` exists since 1.0. Requiring 1.0
would exclude transformers 4.57, which needs an older version, so there are two branches.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from importlib import import_module
from threading import Thread
from time import monotonic
from typing import Any, TypeVar

from streamconv.files.hub_settings import hub_url

Result = TypeVar("Result")

TIMEOUT_SECONDS = 120.0  # without receiving a byte; by default, huggingface_hub waits forever
ANSWER_SECONDS = 300.0  # for a complete response: the timeout above restarts with every byte


class NoAnswerError(Exception):
    """The Hub did not send a complete response within `ANSWER_SECONDS`: it may send a byte every few seconds."""


def in_time(function: Callable[[], Result], sent_at: Callable[[], float]) -> Result:
    """Call a function in another thread; raise `NoAnswerError` if it takes longer than `ANSWER_SECONDS`.

    ``sent_at`` returns when the request was sent, by `monotonic`. It may grow while the function runs.
    """
    result: Future[Result] = Future()

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=work, name="hub", daemon=True).start()
    while (seconds := sent_at() + ANSWER_SECONDS - monotonic()) > 0:
        if wait([result], seconds).done:
            return result.result()
    raise NoAnswerError


def configure_process() -> None:
    """Limit the time of huggingface_hub's requests, and silence its progress bars, its log and its warnings.

    These settings apply to the whole process, so only a program may change them: the command line does, the library
    never does. A service that embeds the library may have its own client, with its own proxies and certificates.
    `set_client_factory` would replace that client and close it while other threads use it, and could not be undone,
    because huggingface_hub has no way to read the current factory.

    Raises:
        UsageError: see `hub_url`.
    """
    hub_url()
    from huggingface_hub.utils import disable_progress_bars, logging

    warnings.filterwarnings("ignore", module="huggingface_hub")
    disable_progress_bars()  # they would garble ours
    logging.set_verbosity(logging.ERROR)  # its warnings show signed URLs
    hub: Any = import_module("huggingface_hub")
    http = _http_library()
    if hasattr(hub, "set_client_factory"):
        client = _client_class(http)
        hub.set_client_factory(lambda: client(follow_redirects=True, timeout=TIMEOUT_SECONDS))
        return

    class Session(http.Session):  # type: ignore[misc, name-defined]
        def request(self, *args: Any, **options: Any) -> Any:
            return super().request(*args, **{"timeout": TIMEOUT_SECONDS, **options})

    hub.configure_http_backend(Session)


def _client_class(http: Any) -> Any:
    """Return a client class whose responses must be complete within `ANSWER_SECONDS` after the request was sent.

    If the Hub asks to wait longer than that before a retry, huggingface_hub does not see these headers.
    """

    class Body(http.SyncByteStream):  # type: ignore[misc]
        def __init__(self, stream: Any):
            self._stream, self.sent_at = stream, monotonic()

        def __iter__(self) -> Iterator[bytes]:
            for part in self._stream:
                yield part
                self.sent_at = monotonic()

        def close(self) -> None:
            self._stream.close()

    class Client(http.Client):  # type: ignore[misc]
        def send(self, request: Any, **options: Any) -> Any:
            request.stream = body = Body(request.stream)
            send = super().send
            response = in_time(lambda: send(request, **options), lambda: body.sent_at)
            for name in ("retry-after", "ratelimit"):  # huggingface_hub sleeps for as long as they say
                if any(
                    int(number[:9]) > ANSWER_SECONDS for number in re.findall("[0-9]+", response.headers.get(name, ""))
                ):
                    del response.headers[name]
            return response

    return Client


def timeout_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that mean that a server did not respond in time."""
    http = _http_library()
    return (TimeoutError, http.Timeout if http.__name__ == "requests" else http.TimeoutException)


def network_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that mean that a connection failed or broke, including `timeout_errors`."""
    http = _http_library()
    broken = http.RequestException if http.__name__ == "requests" else http.TransportError
    return (*timeout_errors(), ConnectionError, broken)


def _http_library() -> Any:
    """Return the module of the HTTP library that huggingface_hub uses; others may be installed, too."""
    from huggingface_hub import __version__

    return import_module(("requests", "httpx", "httpx2")[min(int(__version__.partition(".")[0]), 2)])
