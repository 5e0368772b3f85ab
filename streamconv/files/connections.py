"""Connections over http and https, by Python's own client, which reads straight into the caller's memory.

Proxies come from the usual environment variables (HTTPS_PROXY, HTTP_PROXY, NO_PROXY). Credentials are sent only
to the host that they are for, wherever redirects lead.
"""

import base64
import os
import socket
import ssl
from http.client import HTTPConnection, HTTPSConnection
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from streamconv._version import __version__
from streamconv.errors import SourceError, UsageError, printable
from streamconv.files.address import is_valid_url

TIMEOUT_SECONDS = 30.0  # to connect, and to wait for the next byte
_UNQUOTED = "/%:=&?~#+!$,;'@()*[]"  # characters that are sent as they are (RFC 3986, 2.2)


def connect(url: SplitResult) -> HTTPConnection:
    """Open a connection to the host of ``url``, or to the proxy for it.

    Raises:
        OSError: the host or its proxy cannot be reached.
        SourceError: the host's certificate is not valid.
        UsageError: the proxy in the environment is not an http proxy.
    """
    proxy = _proxy(url)
    peer = proxy or url
    is_https = url.scheme == "https"
    connection_type = HTTPSConnection if is_https else HTTPConnection
    host = peer.hostname or ""
    connection = connection_type(host, peer.port or (80 if proxy or not is_https else 443), timeout=TIMEOUT_SECONDS)
    if proxy and is_https:
        connection.set_tunnel(url.hostname or "", url.port or 443, _proxy_credentials(proxy))
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        raise SourceError(
            f"The certificate of {url.hostname} cannot be trusted: {error.verify_message}. Check the address, "
            "or set SSL_CERT_FILE to the certificates of your own authority."
        ) from error
    except socket.gaierror as error:
        raise ConnectionError(f"cannot find the {'proxy' if proxy else 'host'} {host} ({error.strerror})") from error
    except OSError as error:
        if proxy:
            raise ConnectionError(f"cannot connect through the proxy {host} ({error})") from error
        raise
    return connection


def request(connection: HTTPConnection, url: SplitResult, origin: str, headers: dict[str, str]) -> None:
    """Send a GET request for ``url``. ``origin`` is the address that the user gave, before any redirect."""
    proxy = _proxy(url)
    netloc = url.netloc.rpartition("@")[2]
    if proxy and url.scheme == "http":
        target = url._replace(netloc=netloc, fragment="").geturl()
        headers = {**headers, **_proxy_credentials(proxy)}
    else:
        target = url._replace(scheme="", netloc="", path=url.path or "/", fragment="").geturl()
    authorization = _authorization(url, urlsplit(origin))
    connection.request(
        "GET",
        quote(target, safe=_UNQUOTED),
        headers={
            **headers,
            "User-Agent": f"streamconv/{__version__}",
            "Accept-Encoding": "identity",
            **({"Authorization": authorization} if authorization else {}),
        },
    )


def hub_endpoint() -> str:
    """Return the Hub's address. Read here as huggingface_hub reads it, because importing that costs 20 MB."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _authorization(url: SplitResult, origin: SplitResult) -> str | None:
    """Return credentials for the host of ``url``: those in ``origin`` if it has the same host, else the Hub's token."""
    if origin.username is not None and _host(url) == _host(origin):
        return _basic(origin)
    if _host(url) == _host(urlsplit(hub_endpoint())):
        from huggingface_hub import get_token

        token = get_token()
        return f"Bearer {token}" if token else None
    return None


def _host(url: SplitResult) -> tuple[str, str | None, int | None]:
    return url.scheme, url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _proxy(url: SplitResult) -> SplitResult | None:
    """Return the address of the proxy for ``url``, if the environment sets one."""
    proxies = getproxies()
    text = proxies.get(url.scheme) or proxies.get("all")
    if not text or proxy_bypass(url.netloc.rpartition("@")[2]):
        return None
    text = text if "://" in text else f"http://{text}"
    if not text.startswith("http://") or not is_valid_url(text):
        raise UsageError(
            f"streamconv cannot use the proxy {printable(text.rpartition('@')[2])}, which the environment sets. "
            f"Set {url.scheme.upper()}_PROXY to http://HOST:PORT, or add {url.hostname} to NO_PROXY."
        )
    return urlsplit(text)


def _proxy_credentials(proxy: SplitResult) -> dict[str, str]:
    return {} if proxy.username is None else {"Proxy-Authorization": _basic(proxy)}


def _basic(url: SplitResult) -> str:
    """Return the header value for the user and password in ``url`` (RFC 7617)."""
    pair = f"{unquote(url.username or '')}:{unquote(url.password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"
