"""Opens a shared output by its location."""

from pathlib import Path

from streamconv.errors import UsageError
from streamconv.files.address import Location
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
    if location.scheme in ("s3", "s3a"):
        return S3Output(location)
    raise UsageError(f"{location} is a URL that cannot be written to. Give a folder.")
