"""The Hub's address and the user's token, from the environment as huggingface_hub reads them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import SplitResult, urlsplit

from streamconv.display import printable
from streamconv.errors import UsageError
from streamconv.redaction import redacted, shown_url


def hub_endpoint() -> SplitResult:
    """Return the URL of the Hub. It is read here, because importing huggingface_hub costs 20 MB.

    Raises:
        UsageError: HF_ENDPOINT is not a URL.
    """
    url = os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co"
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        shown = printable(shown_url(url))
        raise UsageError(f"HF_ENDPOINT is {shown}, which is not a URL. Set it to https://HOST:PORT, or unset it.")
    return parts


def hub_url() -> str:
    """Return the URL of the Hub for huggingface_hub, which on its own would accept an empty HF_ENDPOINT as a URL.

    Call this before huggingface_hub is imported for the first time.

    Raises:
        UsageError: HF_ENDPOINT is not a URL, or huggingface_hub cannot use another of its settings.
    """
    url = hub_endpoint().geturl().rstrip("/")
    try:
        import huggingface_hub.constants  # noqa: F401 - parses the environment
    except ValueError as error:
        raise UsageError(
            f"An environment variable of huggingface_hub is not valid: {printable(redacted(str(error)))}. Correct or "
            "unset the variable, whose name begins with HF_."
        ) from None
    return url


def hub_endpoint_for(host: str) -> SplitResult | None:
    """Return the URL of the Hub; None if HF_ENDPOINT is not a URL, and ``host`` is certainly another host.

    Raises:
        UsageError: HF_ENDPOINT is not a URL, and may name this host.
    """
    try:
        return hub_endpoint()
    except UsageError:
        if host in os.environ["HF_ENDPOINT"].lower() or host == "huggingface.co":
            raise
        return None


@contextmanager
def without_invalid_endpoint() -> Iterator[None]:
    """Hide an invalid HF_ENDPOINT, so that packages can import huggingface_hub. The block must not use the Hub."""
    hidden = None
    try:
        hub_endpoint()
    except UsageError:
        hidden = os.environ.pop("HF_ENDPOINT")
    try:
        yield
    finally:
        if hidden is not None:
            os.environ["HF_ENDPOINT"] = hidden


def hub_token() -> str:
    """Return the user's token; empty if there is none.

    Raises:
        UsageError: it cannot be read or sent, or as for `hub_url`.
    """
    hub_url()
    from huggingface_hub import get_token

    try:
        token = get_token() or ""
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(
            f"The Hub's token cannot be read: {why}. Log in with `hf auth login`, or set HF_TOKEN."
        ) from None
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UsageError(
            "The Hub's token contains characters that no token has. Set HF_TOKEN again, or run `hf auth login`."
        )
    return token
