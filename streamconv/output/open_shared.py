"""Opens a shared output by its location."""

from pathlib import Path

from streamconv.errors import UsageError
from streamconv.files.address import Location
from streamconv.output.shared import SharedOutput


def open_shared_output(location: Location) -> SharedOutput:
    """Return the output at a path or URL. Nothing is opened or written yet.

    Raises:
        UsageError: nothing can be written to such a URL.
    """
    # Imported only when needed, so that a local conversion does not pay for the memory of the other modules.
    if isinstance(location, Path):
        from streamconv.output.shared_folder import SharedFolder

        return SharedFolder(location)
    if location.scheme == "hf":
        raise UsageError(
            f"{location} is a repository on the Hub. Convert with `streamconv run --push-to-hub`, or push a folder "
            "with `streamconv push`."
        )
    if "::" in location.url:
        raise UsageError(f"{location} is a chain of URLs, which cannot be written to. Give a folder or a store's URL.")
    from streamconv.output.stores.output import StoreOutput

    if location.scheme in ("s3", "s3a"):
        from streamconv.output.stores.s3 import S3Store

        return StoreOutput(S3Store(location))
    from streamconv.output.stores.fsspec_store import FsspecStore

    return StoreOutput(FsspecStore(location))
