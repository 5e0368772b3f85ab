"""The certificates to trust: the system's, or those in SSL_CERT_FILE, SSL_CERT_DIR or REQUESTS_CA_BUNDLE."""

import os
import ssl

from streamconv.display import visible
from streamconv.errors import UsageError


def tls_context() -> ssl.SSLContext:
    """Load the trusted certificates.

    Raises:
        UsageError: those that the environment names cannot be read.
    """
    if "SSL_CERT_FILE" in os.environ or "SSL_CERT_DIR" in os.environ:  # OpenSSL reads these
        file = os.environ.get("SSL_CERT_FILE")
        if file and not os.path.isfile(file):  # OpenSSL would ignore it and trust no server
            raise _unusable("SSL_CERT_FILE", file)
        return ssl.create_default_context()
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or None
    try:
        if bundle and os.path.isdir(bundle):
            return ssl.create_default_context(capath=bundle)
        return ssl.create_default_context(cafile=bundle)
    except OSError as error:
        raise _unusable("REQUESTS_CA_BUNDLE", str(bundle)) from error


def _unusable(variable: str, path: str) -> UsageError:
    return UsageError(
        f"The certificates in {visible(path)}, which {variable} names, cannot be read. Correct or unset it."
    )
