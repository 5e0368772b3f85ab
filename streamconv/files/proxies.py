"""The proxies that the environment sets: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in either case."""

from contextlib import suppress
from ipaddress import ip_address, ip_network
from urllib.parse import SplitResult
from urllib.request import getproxies, proxy_bypass

_PORTS = {"http": 80, "https": 443}


def find_proxy(url: SplitResult) -> str | None:
    """Return the URL of the proxy for ``url``, if the environment sets one."""
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or _is_excluded(url, proxies.get("no", "")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def proxy_variable(url: SplitResult) -> str:
    """Return the name of the variable that sets the proxy for ``url``."""
    return f"{url.scheme.upper()}_PROXY" if getproxies().get(url.scheme) else "ALL_PROXY"


def _is_excluded(url: SplitResult, no_proxy: str) -> bool:
    """Return whether NO_PROXY matches the host of ``url``. Unlike urllib, this supports *.DOMAIN and networks."""
    host, netloc = url.hostname or "", url.netloc.rpartition("@")[2]
    if proxy_bypass(netloc) or (url.port is None and proxy_bypass(f"{netloc}:{_PORTS.get(url.scheme)}")):
        return True
    entries = [entry.strip().lower() for entry in no_proxy.split(",")]
    if any(entry.startswith("*.") and host.endswith(entry[1:]) for entry in entries):
        return True
    with suppress(ValueError):  # the host is a name
        address = ip_address(host)
        for entry in entries:
            with suppress(ValueError):
                if address in ip_network(entry.strip("[]"), strict=False):
                    return True
    return False
