"""An HTTP client: urllib3, with the proxies, certificates and credentials of the user's environment.

HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY choose the proxy. The system's certificates are trusted or, if they are
set, those in SSL_CERT_FILE, SSL_CERT_DIR or REQUESTS_CA_BUNDLE. Credentials are sent only to their own host.
"""

import base64
import ssl
from concurrent.futures import Future, wait
from functools import cached_property
from http.client import BadStatusLine, IncompleteRead, RemoteDisconnected
from importlib import import_module
from socket import gaierror
from threading import Thread
from urllib.parse import SplitResult, unquote, urlsplit

from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Retry
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProxyError

from streamconv._version import __version__
from streamconv.display import printable
from streamconv.errors import NetworkError, SourceError, UsageError
from streamconv.files import slow
from streamconv.files.address import Address
from streamconv.files.hub_settings import hub_endpoint_for, hub_token
from streamconv.files.proxies import find_proxy, proxy_variable
from streamconv.files.tls import tls_context
from streamconv.redaction import WEB, redacted, secrets_of_user

TIMEOUT_SECONDS = 30.0  # to connect, and to wait for the next byte
_Host = tuple[str, str | None, int | None]  # scheme, name, port
_NOT_CONNECTED = (ProxyError, NewConnectionError, ConnectTimeoutError)
_MAX_IDLE = 8  # connections kept to a host, more than are ever in use at once


class Client:
    """Sends GET requests, and reuses connections. ``origin`` is the URL that the user gave, with its credentials."""

    def __init__(self, origin: str):
        self._origin = urlsplit(origin)
        self._managers: dict[_Host, PoolManager] = {}

    def get(self, url: str, headers: dict[str, str]) -> "Future[BaseHTTPResponse]":
        """Send a request in another thread, and return at once. Redirects are not followed.

        The future holds the response, whose body has not been read, or one of these errors:

        Raises:
            OSError: the host or its proxy cannot be reached, or the connection broke.
            SourceError: the host's certificate cannot be trusted.
            UsageError: the proxy or the certificates in the environment cannot be used. Raised by `get` itself.
        """
        parts = urlsplit(url)
        manager = self._manager(parts)
        headers = {**headers, "User-Agent": f"streamconv/{__version__}", **_authorization(parts, self._origin)}
        future: Future[BaseHTTPResponse] = Future()

        def send() -> None:
            try:
                # The caller handles retries and redirects: urllib3 would use one proxy for all hosts of a redirect,
                # follow a redirect from https to http, and forget that a signed URL came from another one.
                response = manager.request(
                    "GET",
                    _without_user(parts).geturl(),
                    headers=headers,
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    decode_content=False,
                    timeout=TIMEOUT_SECONDS,
                )
            except HTTPError as error:
                manager.clear()  # the other idle connections may be broken, too
                future.set_exception(self.translate(error, url))
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(response)

        # Waiting for the headers takes a round trip, during which other responses are read. A daemon, so that an
        # interrupted process does not wait for a silent server.
        Thread(target=send, name="http", daemon=True).start()
        return future

    def wait_for(self, future: "Future[BaseHTTPResponse]") -> BaseHTTPResponse:
        """Wait for the response.

        Raises:
            NetworkError: it did not begin within `RESPONSE_SECONDS`.
            OSError, SourceError: as for `get`.
        """
        if not wait([future], slow.RESPONSE_SECONDS).done:
            raise self._slow(slow.SlowServerError(f"sent no response in {slow.RESPONSE_SECONDS:,.0f} s"))
        return future.result()

    def redacted(self, text: str, url: str) -> str:
        """Return text from a response to a request for ``url``, without the secrets that the request contained."""
        sent = _authorization(urlsplit(url), self._origin).get("Authorization", "").rpartition(" ")[2]
        proxy = urlsplit(find_proxy(urlsplit(url)) or "").netloc.rpartition("@")[0]
        addresses = Address(self._origin.geturl()), Address(url)
        secrets = [secret for address in addresses for secret in address.secrets]
        return redacted(text, [sent, *secrets, *secrets_of_user(proxy)])

    def translate(self, error: HTTPError, url: str) -> OSError | SourceError:
        """Convert an error of urllib3 to one that names its cause. urllib3's own messages contain class names."""
        cause: BaseException = error
        while inner := _cause_of(cause):
            cause = inner
        proxy = find_proxy(urlsplit(url)) if isinstance(error, _NOT_CONNECTED) else None
        peer = urlsplit(proxy or url)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return SourceError(
                f"The certificate of {peer.hostname} cannot be trusted: {cause.verify_message}. Check the URL, "
                "or set SSL_CERT_FILE to a file with the certificate of your own authority."
            )
        if isinstance(cause, slow.SlowServerError):
            return self._slow(cause)
        if isinstance(cause, IncompleteRead):
            return ConnectionError("the connection was closed")
        if isinstance(cause, BadStatusLine) and not isinstance(cause, RemoteDisconnected):
            reason = f"the response is not HTTP: {printable(self.redacted(str(cause), url))}"
        else:
            reason = self.redacted(str(getattr(cause, "strerror", None) or cause) or type(cause).__name__, url)
        if proxy:
            return ConnectionError(
                f"cannot connect through the proxy {peer.hostname}, which {proxy_variable(urlsplit(url))} names "
                f"({reason})"
            )
        if isinstance(cause, gaierror):
            return ConnectionError(f"cannot find the host {peer.hostname} ({reason})")
        if isinstance(error, _NOT_CONNECTED):
            return ConnectionError(f"cannot connect to {peer.hostname} ({reason})")
        return ConnectionError(reason)

    def _slow(self, error: slow.SlowServerError) -> NetworkError:
        """Return the error for a server that is too slow, which is not retried."""
        return NetworkError(
            f"{Address(self._origin.geturl())} cannot be read: its server {error}. Check the network, and run the same "
            "command again to resume."
        )

    def close_idle(self) -> None:
        """Close the connections that are not in use."""
        for manager in self._managers.values():
            manager.clear()

    def _manager(self, url: SplitResult) -> PoolManager:
        """Return the connections to a host. Its proxy is looked up once, because that takes as long as a request."""
        scheme, host, _ = key = _host(url)
        if key in self._managers:
            return self._managers[key]
        proxy = find_proxy(url)
        try:
            manager = self._managers[key] = self._make_manager(scheme, proxy)
            slow.watch_responses(manager)
        except (ValueError, ImportError) as error:  # urllib3's errors for a URL are ValueErrors
            shown = printable((proxy or "").rpartition("@")[2])
            why = " without PySocks (`pip install PySocks`)" if isinstance(error, ImportError) else ""
            raise UsageError(
                f"streamconv cannot use the proxy {shown} from the environment{why}. "
                f"Set {scheme.upper()}_PROXY to http://HOST:PORT, or add {host} to NO_PROXY."
            ) from None
        return self._managers[key]

    def _make_manager(self, scheme: str, proxy: str | None) -> PoolManager:
        parts = urlsplit(proxy or "")
        context = self._tls_context if "https" in (scheme, parts.scheme) else None
        if not proxy:
            return PoolManager(maxsize=_MAX_IDLE, ssl_context=context)
        if not parts.hostname:
            raise ValueError("no host")
        if parts.scheme.startswith("socks"):
            import_module("socks")  # raises ImportError if PySocks is missing; urllib3 would also warn
            from urllib3.contrib.socks import SOCKSProxyManager

            return SOCKSProxyManager(proxy, maxsize=_MAX_IDLE, ssl_context=context)
        return ProxyManager(
            _without_user(parts).geturl(),
            proxy_headers={} if parts.username is None else {"Proxy-Authorization": _basic(parts)},
            proxy_ssl_context=context,
            maxsize=_MAX_IDLE,
            ssl_context=context,
        )

    @cached_property
    def _tls_context(self) -> ssl.SSLContext:
        return tls_context()  # all connections share it, because loading the certificates takes 50 ms


def environment_problem(host: str) -> str:
    """Return why no library can connect to ``host`` with the environment's proxies and certificates; "" if it can."""
    for scheme in WEB:
        url = urlsplit(f"{scheme}://{host}")
        if (find_proxy(url) or "").startswith("socks"):
            continue  # libraries need different packages for it, which they name
        try:
            Client(url.geturl())._manager(url)
        except UsageError as error:
            return str(error)
    return ""


def seconds_to_wait(response: BaseHTTPResponse) -> float | None:
    """Return the seconds to wait, which Retry-After gives as a number or as a date (RFC 9110, 10.2.3)."""
    try:
        return Retry().get_retry_after(response)
    except (HTTPError, ValueError, OverflowError):
        return None


def _cause_of(error: BaseException) -> BaseException | None:
    """Return the exception that caused an error of urllib3, if there is one."""
    inner = next((each for each in error.args if isinstance(each, BaseException)), None)
    # urllib3's SOCKS connections name no cause, but they raise the error while they handle it.
    return error.__cause__ or inner or (error.__context__ if isinstance(error, NewConnectionError) else None)


def _authorization(url: SplitResult, origin: SplitResult) -> dict[str, str]:
    """Return credentials for the host of ``url``: those in ``origin`` if it has the same host, else the Hub's token."""
    if origin.username is not None and _host(url) == _host(origin):
        return {"Authorization": _basic(origin)}
    hub = hub_endpoint_for(url.hostname or "")
    if hub is not None and _host(url) == _host(hub):
        token = hub_token()
        return {"Authorization": f"Bearer {token}"} if token else {}
    return {}


def _host(url: SplitResult) -> _Host:
    return url.scheme, url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _without_user(url: SplitResult) -> SplitResult:
    return url._replace(netloc=url.netloc.rpartition("@")[2])


def _basic(url: SplitResult) -> str:
    """Return the header value for the user and password in ``url`` (RFC 7617); urllib3's accepts only Latin-1."""
    pair = f"{unquote(url.username or '')}:{unquote(url.password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"
