"""Resumable files that are written next to others instead of into a separate folder."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from streamconv.errors import OutputError
from streamconv.logs import logger
from streamconv.output.disk import allocated_bytes, require_space
from streamconv.output.files import as_output_error, temporary_path
from streamconv.output.identity import differences
from streamconv.output.journal import Journal, name_in
from streamconv.output.manifest import Provenance
from streamconv.output.open_journal import OpenJournal, locked_journal

_log = logger(__name__)


def journal_path(files: Iterable[Path]) -> Path:
    """Return the path of these files' journal: a hidden file next to the first one."""
    first = next(iter(files))
    return first.with_name(f".{first.name}.streamconv-journal")


@contextmanager
def resumable_files(files: Mapping[Path, int], provenance: Provenance, *, force: bool = False) -> Iterator[OpenJournal]:
    """Open the journal of files that this process alone writes; it is deleted when the block ends well.

    Files that were written from another source, partly or completely, are not resumed, but written again.

    Args:
        files: The files, with their sizes in bytes.
        force: Files of these names may exist, and are replaced when the new ones are complete.

    Raises:
        OutputError: a file exists, is being written by another process, or its disk is too full.
    """
    with locked_journal(journal_path(files), next(iter(files))) as journal:
        try:
            previous = journal.contents.provenance
            changes = [] if previous is None else differences(previous, provenance)
            require_absent(files, journal.contents, force=force)
            finished = [file for file in files if not force and os.path.lexists(file)]
            _require_recorded(finished, journal)
            if changes:
                if journal.contents.is_resumable:
                    names = " and ".join(map(str, files))
                    _log.info("starting over with %s, because the %s changed", names, " and ".join(changes))
                with as_output_error(journal.path):
                    for file in finished:  # first: without the journal, they would count as the user's
                        file.unlink()
                journal.forget()
            for file, size in files.items():
                require_space(file.parent, missing_bytes(file, size, journal.recorded(file).size))
            journal.start(provenance, {})
            yield journal
            journal.remove()
        except BaseException:
            with suppress(OSError):  # a disk on which nothing can be removed; the first error reports it
                journal.abandon(files)
            raise


def missing_bytes(file: Path, size: int, written: int) -> int:
    """Return how many of a file's bytes have no space on the disk yet; its journal records ``written`` bytes."""
    begun = temporary_path(file)
    if written and not os.path.exists(begun):
        begun = file  # an interrupted process has completed it; any other file stays until it is replaced
    return size - allocated_bytes(begun, written)


def require_absent(files: Iterable[Path], journal: Journal, *, force: bool = False) -> None:
    """Refuse to replace a file, unless an interrupted process completed it before the others, or with ``force``.

    Raises:
        OutputError: a file exists, or a folder of its name does.
    """
    for file in files:
        if os.path.isdir(file):
            raise OutputError(f"{file} is a folder. Choose another name.")
        if force:
            continue
        point = journal.resume_points.get(name_in(journal_path(files), file))
        if os.path.lexists(file) and (point is None or not point.size or file.stat().st_size != point.size):
            raise _exists(file)


def _require_recorded(finished: Iterable[Path], journal: OpenJournal) -> None:
    """Refuse to replace files whose sha256 is not the one that an interrupted process recorded."""
    for file in finished:
        if _sha256(file) != journal.recorded(file).sha256:
            raise _exists(file)


def _sha256(path: Path) -> str:
    digest = sha256()
    with as_output_error(path), open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _exists(file: Path) -> OutputError:
    return OutputError(f"{file} exists already. Choose another name, or replace it with --force.")
