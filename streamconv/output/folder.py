"""An output folder while a process writes it: the lock, the journal and the files.

A finished folder has ``streamconv.json``, its manifest. An unfinished one has a journal, on which the process that
writes holds a lock.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from streamconv.formats.safetensors import INDEX_NAME
from streamconv.logs import logger
from streamconv.output.disk import allocated_bytes, require_space
from streamconv.output.files import as_output_error, make_folder, sync_folder, temporary_path, write_file
from streamconv.output.identity import differences
from streamconv.output.journal import JOURNAL_NAME, Journal
from streamconv.output.manifest import MANIFEST_NAME, Manifest, Provenance, WrittenFile
from streamconv.output.open_journal import OpenJournal, locked_journal
from streamconv.output.ownership import owned_names, refuse_parts, require_free

_log = logger(__name__)


class OutputFolder:
    """A folder that only this process writes, until it is finished."""

    def __init__(self, path: Path, journal: OpenJournal):
        self.path, self.journal = path, journal
        self.is_removed = False

    def uploaded(self, name: str, to: str) -> WrittenFile | None:
        """Return the size and sha256 of a file that was uploaded to ``to``; None if it was not uploaded."""
        point = self.journal.recorded(self.path / name)
        return point.written if point.sent_to == to else None

    def mark_uploaded(self, name: str, to: str) -> None:
        """Record that a complete file was uploaded, and delete it from the disk."""
        file = self.path / name
        self.journal.record(file, replace(self.journal.recorded(file), sent_to=to))
        with as_output_error(file):
            file.unlink()

    def discard(self, name: str) -> None:
        """Delete a partial file that cannot be trusted."""
        self.journal.discard(self.path / name)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, complete or not at all."""
        self.journal.require_linked()
        write_file(self.path / name, data)

    def finish(self) -> None:
        """End the journal: all files are complete."""
        self.journal.remove()
        with as_output_error(self.path):
            sync_folder(self.path)

    def remove_staging(self, names: Sequence[str]) -> None:
        """Delete our files and, when the folder is closed, the folder if it is empty. Everything has been uploaded."""
        self.journal.require_linked()
        with as_output_error(self.path):
            for name in (*names, MANIFEST_NAME):
                (self.path / name).unlink(missing_ok=True)
            (self.path / JOURNAL_NAME).unlink()
        self.is_removed = True


def check_output_folder(
    folder: Path, provenance: Provenance, names: Sequence[str], size: int, *, force: bool = False
) -> None:
    """Refuse a folder that holds something else, or whose disk is too full; arguments as for `open_output_folder`.

    Raises:
        OutputError
    """
    refuse_parts(folder)
    journal = Journal.read(folder / JOURNAL_NAME)
    require_free(folder, provenance, names, journal, force=force)
    require_space(folder, growth(folder, names, size, force=force))


def growth(folder: Path, names: Sequence[str], size: int, *, force: bool = False) -> int:
    """Return the bytes that a folder will grow by; arguments as for `open_output_folder`."""
    journal = Journal.read(folder / JOURNAL_NAME)
    replaced = {*names, *(owned_names(folder, journal) if force else ())}
    complete = sum(allocated_bytes(folder / name) for name in replaced)
    begun = sum(allocated_bytes(temporary_path(folder / name), journal.size_of(name)) for name in replaced)
    return max(0, size - complete - begun)


def _both(path: Path) -> tuple[Path, Path]:
    """Return a file's two paths, that of the complete file and that of the incomplete one."""
    return path, temporary_path(path)


@contextmanager
def open_output_folder(
    folder: Path, provenance: Provenance, names: Sequence[str], size: int, *, force: bool = False
) -> Iterator[OutputFolder]:
    """Open a folder, created if it does not exist, for this process alone, to start or resume a conversion.

    Args:
        names: The files that it will write; ``size`` is their total size in bytes.
        force: Delete the files of a finished conversion, or of an unfinished one that is another.

    Raises:
        OutputError: the folder holds something else, is being written by another process, cannot be
            written, or its disk is too full.
    """
    check_output_folder(folder, provenance, names, size, force=force)
    files = [folder / name for name in names]
    is_removed = is_new = not os.path.exists(folder)
    with as_output_error(folder):
        make_folder(folder)
    try:
        with locked_journal(folder / JOURNAL_NAME, folder) as journal:
            is_removed = False
            try:
                # Files may have appeared before the lock.
                refuse_parts(folder)
                require_free(folder, provenance, names, journal.contents, force=force)
                _start(folder, journal, provenance, force)
                refuse_parts(folder)  # one that began before `is_unfinished` saw this journal; later ones refuse
                work = OutputFolder(folder, journal)
                yield work
                is_removed = work.is_removed
            except BaseException:
                with suppress(OSError):  # a disk that lets nothing be removed; the first error reports it
                    is_removed = journal.abandon(files) and is_new
                raise
    finally:
        if is_removed:  # only now: the lock file is gone, and NFS removes the journal when it is closed
            with suppress(OSError):  # others have files in it
                folder.rmdir()


def _start(folder: Path, journal: OpenJournal, provenance: Provenance, force: bool) -> None:
    previous = journal.contents.provenance
    if differences(previous, provenance) if previous is not None else force and Manifest.read(folder) is not None:
        if owned := owned_names(folder, journal.contents):  # or it had written nothing: see `require_free`
            _log.info("deleting the conversion in %s, to start over", folder)
            remove_conversion(folder, owned)
        journal.forget()
        with as_output_error(folder):
            for path in folder.glob(temporary_path(Path("*.safetensors")).name):  # begun, without a resume point
                path.unlink()
    manifest = Manifest.read(folder)
    journal.start(provenance, manifest.files if manifest is not None else {})


def remove_conversion(folder: Path, names: set[str]) -> None:
    """Delete a conversion's files: the index first, so that no part of it loads, and last the manifest that names them.

    If this process is killed in between, the next one with ``force`` deletes the rest.
    """
    with as_output_error(folder):
        for name in (*sorted(names, key=lambda name: name != INDEX_NAME), MANIFEST_NAME):
            for path in _both(folder / name):
                path.unlink(missing_ok=True)
        sync_folder(folder)
