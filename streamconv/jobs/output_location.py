"""Where an output goes: a folder on this machine, or a URL in a store."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from streamconv.errors import OutputError, UsageError
from streamconv.files.address import Address, Location, local_path, parse_folder
from streamconv.jobs.options import StrPath
from streamconv.jobs.prepare import PreparedSource
from streamconv.output.files import temporary_path
from streamconv.output.journal import JOURNAL_NAME, Journal
from streamconv.output.ownership import owned_names
from streamconv.planning.plan import Plan

CONVERT_FIRST = "Convert with `streamconv convert -o URL`, then verify with `streamconv verify URL SOURCE`."
_ONE_SLASH = re.compile("([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")


def output_folder(folder: StrPath | None, prepared: PreparedSource, *, force: bool) -> Path:
    """Return the folder to write into: the user's, or else one with the model's published name.

    Args:
        force: The files of a conversion in it will be deleted.

    Raises:
        UsageError: the name is empty or a URL, the model has no published name, or the output would overwrite the
            source.
        OutputError: a file has this name.
    """
    path = local_path(folder if folder is not None else default_folder(prepared), "output folder", CONVERT_FIRST)
    read = [path for checkpoint in prepared.source.checkpoints.values() for path in checkpoint.paths]
    refuse_own_output(read, path, prepared.plan.filenames, force=force)
    return path


def default_folder(prepared: PreparedSource) -> str:
    """Return the model's published name, for a folder in the current one.

    Raises:
        UsageError: it has none.
    """
    if prepared.named_model is None:
        file = prepared.source.source.backbone
        raise UsageError(f"{file} is not a published model, so the output needs a name. Give -o DIR.")
    return prepared.named_model.published_name


def refuse_file(folder: Path) -> None:
    """Refuse the path of a file as that of an output folder.

    Raises:
        OutputError
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise OutputError(f"{folder} is a file. Name a folder for the output.")


def refuse_own_output(read: Iterable[Path], folder: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuse to overwrite the source.

    Args:
        read: The files of the source.
        names: The files to be written. With ``force``, those of a conversion in the folder will be deleted, too.

    Raises:
        UsageError: the source would be overwritten.
        OutputError: a file has the folder's name.
    """
    refuse_file(folder)
    replaced = owned_names(folder, Journal.read(folder / JOURNAL_NAME)) if force else ()
    paths = (folder / name for name in (*names, *replaced))
    written = [each for path in paths for each in (path, temporary_path(path)) if os.path.exists(each)]
    for path in read:
        if any(_is_same(path, each) for each in written):
            raise UsageError(f"{path} is the source, and output to {folder} would overwrite it. Choose another folder.")


def _is_same(path: Path, other: Path) -> bool:
    """Return whether both are one file. Another process may have renamed or deleted either meanwhile."""
    try:
        return os.path.samefile(path, other)
    except FileNotFoundError:
        return False


def output_location(output: StrPath) -> Location:
    """Return the folder or URL that the user names.

    Raises:
        UsageError: the name is empty, or the URL is not valid.
    """
    if isinstance(output, str) and (misspelt := _ONE_SLASH.match(output)):
        scheme = misspelt[1]
        raise UsageError(
            f"The output has one slash after {scheme}:. Write {scheme}://BUCKET/FOLDER, or ./{scheme}:/… for a folder "
            "on this machine."
        )
    location = parse_folder(output, "output folder")
    if isinstance(location, Address) and "?" in location.url:
        raise UsageError(
            f"{location} was given with a query, which an output cannot have. Omit the question mark and what follows."
        )
    return location


def refuse_overwriting_source(plan: Plan, location: Location, *, force: bool) -> None:
    """Refuse an output that would overwrite the files that the plan reads.

    Raises:
        UsageError, OutputError: see `refuse_own_output`.
    """
    read = [file.location for file in plan.sources()]
    if isinstance(location, Path):
        paths = [each for each in read if isinstance(each, Path)]
        refuse_own_output(paths, location, plan.filenames, force=force)
        return
    written = {f"{location.url}/{name}" for name in plan.filenames}
    for each in read:
        if isinstance(each, Address) and each.url in written:
            raise UsageError(f"{each} is the source, and the output would overwrite it. Choose another URL.")
