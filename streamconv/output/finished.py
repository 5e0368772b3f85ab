"""Compares an output folder with what was written to it: files may be unchanged, edited by the user, or lost."""

from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from streamconv.errors import SourceError, SourceMissingError
from streamconv.files.address import Location
from streamconv.files.folders import file_in, read_small
from streamconv.files.open import open_file
from streamconv.output.journal import JOURNAL_NAME, Journal, is_unfinished
from streamconv.output.manifest import Manifest, Provenance, WrittenFile, is_weights
from streamconv.output.ownership import refuse_parts, require_free
from streamconv.output.readable import reading_output

Loss = Literal["missing", "incomplete"]


@dataclass(frozen=True)
class EarlierOutput:
    """The output of the same conversion that a folder holds.

    ``manifest`` is None if the conversion was never finished. ``is_being_written``: a process is writing it, or was
    interrupted. ``edited`` are small files with contents that streamconv did not write, and ``lost`` are files of a
    finished conversion that do not exist, that hold weights and have another size, or that are empty.
    """

    manifest: Manifest | None
    is_being_written: bool
    edited: tuple[str, ...]
    lost: Mapping[str, Loss]

    @property
    def finished(self) -> Manifest | None:
        """The manifest, if every file is there and every weight file has its full size."""
        return self.manifest if not self.is_being_written and not self.lost else None


NOTHING = EarlierOutput(None, False, (), {})


def find_earlier(
    folder: Path, provenance: Provenance, names: Sequence[str], small_files: Mapping[str, bytes]
) -> EarlierOutput:
    """Compare a folder with its manifest, if the same conversion was finished in it.

    Args:
        names: The files that the conversion writes.
        small_files: The contents of the small ones, by name. They count if there is no manifest yet.

    Raises:
        OutputError: the folder holds something else, or a file that cannot be read.
    """
    refuse_parts(folder)
    journal = Journal.read(folder / JOURNAL_NAME)
    require_free(folder, provenance, names, journal)
    manifest = Manifest.read(folder)
    if manifest is not None and manifest.files.keys() != set(names):
        manifest = None
    if manifest is None:
        planned = {name: WrittenFile(len(data), sha256(data).hexdigest()) for name, data in small_files.items()}
        edited, lost = find_edited(folder, planned), {}
    else:
        edited, lost = find_edited(folder, manifest.files), _lost(folder, manifest)
    return EarlierOutput(manifest, is_unfinished(folder), tuple(sorted(edited)), lost)


def find_edited(folder: Location, written: Mapping[str, WrittenFile]) -> dict[str, WrittenFile]:
    """Return the small files that have other contents than were ``written``, as they are now.

    A file that is too large to be read has an empty sha256.

    Raises:
        OutputError: a file cannot be read.
    """
    found = {}
    for name, file in written.items():
        path = file_in(folder, name)
        if is_weights(name) or (size := _size(path)) is None:
            continue
        try:
            with reading_output():
                data = read_small(path)
            now = WrittenFile(len(data), sha256(data).hexdigest())
        except SourceError:
            now = WrittenFile(size, "")
        if now.sha256 != file.sha256 and not _is_blank(path):
            found[name] = now
    return found


def _size(path: Location) -> int | None:
    """Return the size of a file in bytes, None if it does not exist."""
    with suppress(SourceMissingError), reading_output(), closing(open_file(path)) as file:
        return file.size
    return None


def _is_blank(path: Location) -> bool:
    """Return whether a small file has no contents: a power cut may leave it so if its file system syncs no files."""
    with suppress(SourceError):
        return not read_small(path).strip(b"\0")
    return False


def _lost(folder: Path, manifest: Manifest) -> dict[str, Loss]:
    lost: dict[str, Loss] = {}
    for name, file in manifest.files.items():
        size = _size(folder / name)
        if size is None:
            lost[name] = "missing"
        elif size != file.size if is_weights(name) else _is_blank(folder / name):
            lost[name] = "incomplete"
    return lost
