"""Connections for http and https by Python's own client, which reads straight into the caller's memory.

Proxies come from the environment, as everywhere (HTTPS_PROXY, HTTP_PROXY, NO_PROXY). A secret goes to
the host that it is for, and to no other, wherever redirects lead.
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

TIMEOUT_SECONDS = 30.0  # for a connection, and between two bytes
_SAFE = "/%:=&?~#+!$,;'@()*[]"  # what stays as it is in a target (RFC 3986, 2.2)


def connect(url: SplitResult) -> HTTPConnection:
    """A connection to the host of ``url``, or to the proxy that leads there.

    Raises:
        OSError: there is none now.
        SourceError: the host's certificate is not valid.
        UsageError: the environment names a proxy of another kind.
    """
    proxy = _proxy(url)
    via = proxy or url
    is_https = url.scheme == "https"
    kind = HTTPSConnection if is_https else HTTPConnection
    host = via.hostname or ""
    connection = kind(host, via.port or (80 if proxy or not is_https else 443), timeout=TIMEOUT_SECONDS)
    if proxy and is_https:
        connection.set_tunnel(url.hostname or "", url.port or 443, _proxy_credentials(proxy))
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        raise SourceError(
            f"{url.hostname} shows no certificate that can be trusted: {error.verify_message}. Check the address, "
            "or name your own authorities by SSL_CERT_FILE."
        ) from error
    except socket.gaierror as error:
        raise ConnectionError(f"no {'proxy' if proxy else 'host'} {host} is found ({error.strerror})") from error
    except OSError as error:
        if proxy:
            raise ConnectionError(f"the proxy {host} leads nowhere ({error})") from error
        raise
    return connection


def request(connection: HTTPConnection, url: SplitResult, origin: str, headers: dict[str, str]) -> None:
    """Send a GET for ``url``, where ``origin``, the address that the user gave, has led."""
    proxy = _proxy(url)
    netloc = url.netloc.rpartition("@")[2]
    if proxy and url.scheme == "http":
        target = url._replace(netloc=netloc, fragment="").geturl()
        headers = {**headers, **_proxy_credentials(proxy)}
    else:
        target = url._replace(scheme="", netloc="", path=url.path or "/", fragment="").geturl()
    secret = _authorization(url, urlsplit(origin))
    connection.request(
        "GET",
        quote(target, safe=_SAFE),
        headers={
            **headers,
            "User-Agent": f"streamconv/{__version__}",
            "Accept-Encoding": "identity",
            **({"Authorization": secret} if secret else {}),
        },
    )


def hub_endpoint() -> str:
    """As huggingface_hub takes it from the environment, which costs 20 MB to import."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _authorization(url: SplitResult, origin: SplitResult) -> str | None:
    if origin.username is not None and _host(url) == _host(origin):
        pair = f"{unquote(origin.username)}:{unquote(origin.password or '')}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"
    if _host(url) == _host(urlsplit(hub_endpoint())):
        from huggingface_hub import get_token

        token = get_token()
        return f"Bearer {token}" if token else None
    return None


def _host(url: SplitResult) -> tuple[str, str | None, int | None]:
    return url.scheme, url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _proxy(url: SplitResult) -> SplitResult | None:
    proxies = getproxies()
    text = proxies.get(url.scheme) or proxies.get("all")
    if not text or proxy_bypass(url.netloc.rpartition("@")[2]):
        return None
    text = text if "://" in text else f"http://{text}"
    if not text.startswith("http://") or not is_valid_url(text):
        raise UsageError(
            f"The environment names a proxy ({printable(text.rpartition('@')[2])}) that streamconv cannot use. "
            f"Set {url.scheme.upper()}_PROXY to http://HOST:PORT, or put {url.hostname} into NO_PROXY."
        )
    return urlsplit(text)


def _proxy_credentials(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
