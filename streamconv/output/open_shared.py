"""Opens a shared output by its location."""

from pathlib import Path

from streamconv.errors import UsageError
from streamconv.files.address import Location
from streamconv.output.fsspec_store import FsspecOutput
from streamconv.output.s3 import S3Output
from streamconv.output.shared import SharedOutput
from streamconv.output.shared_folder import SharedFolder


def open_shared_output(location: Location) -> SharedOutput:
    """Return the output at a path or URL. Nothing is opened or written yet.

    Raises:
        UsageError: nothing can be written to such a URL.
    """
    if isinstance(location, Path):
        return SharedFolder(location)
    if location.scheme == "hf":
        raise UsageError(
            f"{location} is a repository on the Hub. Convert with `streamconv run --push-to-hub`, or push a folder "
            "with `streamconv push`."
        )
    if "::" in location.url:
        raise UsageError(f"{location} is a chain of URLs, which cannot be written to. Give a folder or a store's URL.")
    return S3Output(location) if location.scheme in ("s3", "s3a") else FsspecOutput(location)
