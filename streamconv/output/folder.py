"""An output folder: whose conversion it holds, who is writing it, and how far it is.

A finished one has ``streamconv.json``, its manifest. An unfinished one has a journal, lines of JSON:
the conversion's source and plan, the process that writes (which holds a lock on the journal), and
after every sync of a file how many of its bytes are on the disk, with their sha256. So whoever goes
on has nothing to believe: what an interrupted process left is read back, and must match.
"""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from streamconv.errors import OutputError
from streamconv.output.files import (
    as_output_error,
    is_still_linked,
    make_folder,
    open_exclusive,
    require_space,
    sync_folder,
    temporary_path,
    write_file,
)
from streamconv.output.journal import JOURNAL_NAME, NOT_STARTED, Journal, ResumePoint, resume_points_in
from streamconv.output.manifest import MANIFEST_NAME, differences, read_manifest


class OutputFolder:
    """A folder that this process alone writes, until it is finished."""

    def __init__(self, path: Path, fd: int, journal: Journal):
        self.path, self._fd, self._journal = path, fd, journal

    def resume_point(self, name: str) -> ResumePoint:
        """How far a file is; where there is something to go on from, it has its temporary name again."""
        self._require_ours()
        file = self.path / name
        mark = self._journal.marks.get(name, NOT_STARTED)
        if mark.size:
            with as_output_error(file):
                if not os.path.exists(temporary_path(file)) and os.path.exists(file):
                    os.replace(file, temporary_path(file))
        return mark if os.path.exists(temporary_path(file)) else NOT_STARTED

    def mark(self, name: str, mark: ResumePoint) -> None:
        """Keep, on the disk, how far a file is; its bytes must be there before."""
        self._append({"file": name, **mark.as_dict()})
        self._journal.marks[name] = mark

    def discard(self, name: str) -> None:
        """What was written of a file is not to be trusted: it is deleted."""
        self.mark(name, NOT_STARTED)
        with as_output_error(self.path / name):
            temporary_path(self.path / name).unlink(missing_ok=True)

    def uploaded(self, name: str, to: str) -> ResumePoint | None:
        """What a file was that was sent there before; None where it was not."""
        mark = self._journal.marks.get(name, NOT_STARTED)
        return mark if mark.sent_to == to else None

    def mark_uploaded(self, name: str, to: str) -> None:
        """A whole file was sent: it is deleted here."""
        self.mark(name, replace(self._journal.marks[name], sent_to=to))
        with as_output_error(self.path / name):
            (self.path / name).unlink()

    def remove_staging(self, names: list[str]) -> None:
        """All is elsewhere: nothing of ours stays here, and no folder that holds nothing else."""
        self._require_ours()
        with as_output_error(self.path):
            for name in (*names, MANIFEST_NAME):
                (self.path / name).unlink(missing_ok=True)
            (self.path / JOURNAL_NAME).unlink()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def write(self, name: str, data: bytes) -> None:
        """A small file, whole or absent."""
        self._require_ours()
        write_file(self.path / name, data)

    def finish(self) -> None:
        """End the journal: all files are there."""
        self._require_ours()
        with as_output_error(self.path):
            (self.path / JOURNAL_NAME).unlink()
            sync_folder(self.path)

    def begin(self, conversion: Mapping[str, Any]) -> None:
        """Say whose conversion this is, in a journal that may have begun, and who writes it now.

        The journal's name lasts when the folder is synced: before the first mark, with the marked file's.
        """
        journal = self._journal
        if journal.conversion is not None and differences(journal.conversion, conversion):  # it had written nothing
            journal = self._journal = Journal()
            for path in self.path.glob(temporary_path(Path("*.safetensors")).name):
                path.unlink()
        with as_output_error(self.path / JOURNAL_NAME):
            os.ftruncate(self._fd, journal.length)
            os.lseek(self._fd, journal.length, os.SEEK_SET)
        journal.marks = {**resume_points_in(read_manifest(self.path)), **journal.marks}
        if journal.conversion is None:
            self._append({"conversion": conversion})
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._append({"process": {"pid": os.getpid(), "host": platform.node(), "since": now}})

    def release(self, names: list[str], is_new: bool) -> None:
        """After a failure: keep what the next process can go on from, and nothing else of ours."""
        if not is_still_linked(self._fd, self.path / JOURNAL_NAME):
            return  # the folder is not ours any more
        for name in names:
            if not self._journal.marks.get(name, NOT_STARTED).size:
                temporary_path(self.path / name).unlink(missing_ok=True)
        if not self._journal.is_begun and not any(os.path.exists(self.path / name) for name in names):
            (self.path / JOURNAL_NAME).unlink(missing_ok=True)
            if is_new and not any(self.path.iterdir()):
                self.path.rmdir()

    def _require_ours(self) -> None:
        if not is_still_linked(self._fd, self.path / JOURNAL_NAME):
            raise OutputError(f"{self.path} was removed while it was written. Run the same command again.")

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._require_ours()
        line = json.dumps(entry).encode() + b"\n"
        with as_output_error(self.path / JOURNAL_NAME):
            while line:
                line = line[os.write(self._fd, line) :]
            os.fsync(self._fd)


@contextmanager
def open_output_folder(
    folder: Path, conversion: Mapping[str, Any], names: list[str], size: int
) -> Iterator[OutputFolder]:
    """The folder for this process alone, made where it is not, to begin or to go on with a conversion.

    Args:
        conversion: What the manifest will say of its source and plan.
        names: Of the files that it will write.
        size: Theirs, in bytes.

    Raises:
        OutputError: the folder holds something else, is being written by another process, cannot be
            written, or its disk is too full.
    """
    _refuse_others(folder, conversion, names, Journal.read(folder))
    files = [each for name in names for each in (folder / name, temporary_path(folder / name))]
    require_space(folder, size - sum(path.stat().st_blocks * 512 for path in files if os.path.exists(path)))
    is_new = not os.path.exists(folder)
    with as_output_error(folder):
        make_folder(folder)
        fd = _lock(folder)
    try:
        journal = Journal.read(folder)
        work = OutputFolder(folder, fd, journal)
        try:
            _refuse_others(folder, conversion, names, journal)  # what may have come before the lock
            work.begin(conversion)
            yield work
        except BaseException:
            with suppress(OSError):  # a disk that lets nothing be removed; the first error says it
                work.release(names, is_new)
            raise
    finally:
        os.close(fd)


def _lock(folder: Path) -> int:
    try:
        return open_exclusive(folder / JOURNAL_NAME)
    except BlockingIOError:
        process = Journal.read(folder).process
        known = {"pid", "host", "since"} <= process.keys()
        who = "process {pid} on {host}, since {since}".format_map(process) if known else "another process"
        raise OutputError(f"{folder} is being written by {who}. Let it finish, or end it.") from None


def find_finished(folder: Path, conversion: Mapping[str, Any], names: list[str]) -> dict[str, Any] | None:
    """The manifest of the same conversion, where it is finished there: its files exist, at their full size.

    Raises:
        OutputError: the folder holds something else.
    """
    if os.path.exists(folder / JOURNAL_NAME):
        return None
    _refuse_others(folder, conversion, names, Journal())
    manifest = read_manifest(folder)
    marks = resume_points_in(manifest)
    if not all((folder / name).is_file() and (folder / name).stat().st_size == marks[name].size for name in marks):
        return None
    return manifest if marks.keys() == set(names) else None


def _refuse_others(folder: Path, conversion: Mapping[str, Any], names: list[str], journal: Journal) -> None:
    """Refuse a folder that holds something else than this conversion, or a beginning that wrote nothing."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise OutputError(f"{folder} is a file. Name a folder for the output.")
    manifest = read_manifest(folder)
    existing = manifest if journal.conversion is None else journal.conversion
    present = [name for name in names if os.path.lexists(folder / name)]
    if existing is None:
        if present:
            raise OutputError(
                f"{folder} already holds {', '.join(present)}, which streamconv did not write. Choose another folder."
            )
    elif (other := differences(existing, conversion)) and (present or manifest or journal.is_begun):
        state = "an unfinished" if manifest is None else "another"
        raise OutputError(
            f"{folder} holds {state} conversion, of {existing.get('model') or 'an unnamed model'}: its "
            f"{' and '.join(other)} is another. Choose another folder, or delete this one."
        )
