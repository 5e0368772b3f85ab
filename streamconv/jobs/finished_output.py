"""Refuses an output that is not finished, in a folder or in a store, before it is verified or pushed."""

from pathlib import Path

from streamconv.errors import OutputError
from streamconv.files.address import Location
from streamconv.files.folders import exists, file_in
from streamconv.formats.safetensors import INDEX_NAME, SINGLE_NAME
from streamconv.output.journal import is_unfinished
from streamconv.output.manifest import MANIFEST_NAME
from streamconv.output.ownership import refuse_parts
from streamconv.output.readable import reading_output, require_folder, states_in_store
from streamconv.output.stores.records import CONVERSION


def require_finished(folder: Location) -> None:
    """Check that a folder, on this machine or in a store, may hold a finished conversion.

    Raises:
        OutputError: it does not exist, is unfinished, or cannot be accessed.
    """
    if isinstance(folder, Path):
        require_folder(folder)
        refuse_parts(folder)
        if is_unfinished(folder):
            raise OutputError(
                f"{folder} holds an unfinished conversion. Finish it first: run the same convert command again."
            )
        return
    with reading_output():
        is_being_written = exists(file_in(folder, CONVERSION))
    if is_being_written:
        raise OutputError(
            f"{folder} holds an unfinished conversion. Finish it first: run the same convert command again, or write "
            "all parts and run `streamconv finish`."
        )
    names = states_in_store(folder)
    if not names:
        raise OutputError(
            f"{folder} is not a folder in its store: no file is in it. Give a folder that streamconv wrote."
        )
    if not names.keys() & {MANIFEST_NAME, SINGLE_NAME, INDEX_NAME}:
        raise OutputError(
            f"{folder} has neither {MANIFEST_NAME} nor a complete model, so it holds something else. Give a folder "
            "that streamconv wrote."
        )
