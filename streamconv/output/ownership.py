"""Decides whether a folder is free for a conversion: it may hold the same one, or none of its files."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from streamconv.errors import OutputError
from streamconv.output.identity import differences, is_unidentified, shown_differences
from streamconv.output.journal import Journal
from streamconv.output.manifest import Manifest, Provenance, is_our_name, is_weights
from streamconv.output.readable import names_in


def require_free(
    folder: Path, provenance: Provenance, names: Sequence[str], journal: Journal, *, force: bool = False
) -> None:
    """Refuse a folder that holds something else.

    Args:
        names: The files to be written.
        journal: The folder's own. One of another conversion is no obstacle if nothing was written, or if it cannot be
            resumed because nothing identifies its source.
        force: Another conversion is no obstacle either; files that streamconv did not write are.

    Raises:
        OutputError
    """
    manifest = Manifest.read(folder)
    existing = journal.provenance or manifest
    present = [name for name in names if os.path.lexists(folder / name)]
    foreign = present
    if existing is not None:
        # A journal does not name the small files, which are written last.
        owned = owned_names(folder, journal)
        foreign = [name for name in present if name not in owned and (manifest or is_weights(name))]
    if foreign and (existing is None or (force and differences(existing, provenance))):
        raise OutputError(
            f"{folder} already holds {', '.join(foreign)}, which streamconv did not write. Choose another folder."
        )
    if existing is None or force or (manifest is None and is_unidentified(existing, provenance)):
        return
    if (other := differences(existing, provenance)) and (present or manifest or journal.is_resumable):
        state = "an unfinished" if manifest is None else "another"
        raise OutputError(
            f"{folder} holds {state} conversion, of {existing.title}: its "
            f"{shown_differences(other)}. Choose another folder, or replace it with "
            "--force."
        )


_JOURNAL_OF_FILE = re.compile(r"\.(model(?:-\d{5}-of-\d{5})?\.safetensors)\.streamconv-journal")


def files_with_journals(folder: Path) -> list[str]:
    """Return the names of the weight files that have journals of their own; see `SharedFolder`.

    Raises:
        OutputError: the folder cannot be listed.
    """
    matches = map(_JOURNAL_OF_FILE.fullmatch, names_in(folder))
    return sorted(match[1] for match in matches if match is not None)


def refuse_parts(folder: Path) -> None:
    """Refuse a folder that several processes write, or have begun to write.

    Raises:
        OutputError
    """
    if names := files_with_journals(folder):
        raise OutputError(
            f"{folder} is being written in parts, such as {names[0]}. Write the others with `streamconv convert --plan "
            f"FILE --part I/N -o {folder}` (or with the same --workers or --scheduler as before), then run "
            f"`streamconv finish {folder} --plan FILE`. To start over, delete the folder."
        )


def owned_names(folder: Path, journal: Journal) -> set[str]:
    """Return the names of the files of an output that a folder's manifest or journal names."""
    manifest = Manifest.read(folder)
    names = {*journal.resume_points, *(manifest.files if manifest is not None else ())}
    return {name for name in names if is_our_name(name)}
