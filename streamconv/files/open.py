"""Opens a file by its location, with the class that its scheme needs."""

from pathlib import Path

from streamconv.errors import NetworkError
from streamconv.files.address import Address, Location, hf_to_https
from streamconv.files.base import File, Version
from streamconv.files.hub_settings import hub_url
from streamconv.files.local import LocalFile


def open_file(location: Location, origin: Address | None = None, expected: Version = ()) -> File:
    """Open a file.

    Args:
        origin: The address that a file on this machine was downloaded from. Messages name it instead of the path.
        expected: The version that an earlier process has opened. A server that has several is asked for this one.

    Raises:
        UsageError, SourceError: see `LocalFile`, `HttpFile` and `FsspecFile`.
    """
    if isinstance(location, Path):
        return LocalFile(location, origin)
    # Imported only when needed, so that a local conversion does not pay for their memory.
    if location.scheme == "data":
        from streamconv.files.inline import InlineFile

        return InlineFile(location)
    if location.scheme in ("http", "https", "hf"):
        from streamconv.files.http import HttpFile

        if location.scheme == "hf":
            location = _on_the_hub(location)
        return HttpFile(location, expected)
    from streamconv.files.fsspec import FsspecFile

    return FsspecFile(location)


def _on_the_hub(address: Address) -> Address:
    """Return the https URL of an hf:// URL, unless HF_HUB_OFFLINE forbids requests."""
    hub_url()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise NetworkError(f"HF_HUB_OFFLINE is set, so {address} cannot be fetched. Unset it, or give a local file.")
    return hf_to_https(address)
