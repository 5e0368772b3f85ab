"""The journal of an output that this process writes: locked, and synced line by line."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamconv.errors import BusyError, OutputError
from streamconv.logs import logger
from streamconv.output.files import as_output_error, sync_file, temporary_path
from streamconv.output.journal import MAX_JOURNAL_BYTES, NOT_STARTED, Journal, ResumePoint, name_in
from streamconv.output.locks import LockedError, LockedFile, open_exclusive, require_unlocked
from streamconv.output.manifest import FORMAT_VERSION, Provenance, WrittenFile
from streamconv.output.processes import Process

_log = logger(__name__)


class OpenJournal:
    """A journal that this process has locked, and the files whose progress it records.

    ``output`` is what they make up, for messages.
    """

    def __init__(self, path: Path, output: Path, file: LockedFile):
        self.path, self._output, self._file, self._fd = path, output, file, file.fd
        # By the locked descriptor: CIFS lets no other one read a locked file.
        self.contents = Journal.parse(_read(file.fd, path), path)

    def start(self, provenance: Provenance, complete: Mapping[str, WrittenFile], part: str = "") -> None:
        """Record the provenance, unless the journal has it already, and that this process writes from now on.

        ``complete`` are files that an earlier process had finished; ``part`` is the part that this process was given.
        The journal's name lasts when the folder is synced: before the first resume point, together with the file's.
        """
        journal = self.contents
        with as_output_error(self.path):
            os.ftruncate(self._fd, journal.length)
            os.lseek(self._fd, journal.length, os.SEEK_SET)
        points = {
            name: ResumePoint(file.size, file.sha256, overflow_count=file.overflow_count)
            for name, file in complete.items()
            if file.sha256  # a file without one cannot be checked
        }
        journal.resume_points = {**points, **journal.resume_points}
        if journal.provenance is None:
            self._append({"format_version": FORMAT_VERSION, "provenance": asdict(provenance)})
        self._append({"process": asdict(Process.this()), "part": part})

    def forget(self) -> None:
        """Start over: forget what the journal records."""
        self.contents = Journal()

    def recorded(self, file: Path) -> ResumePoint:
        """Return the resume point that the journal records for a file."""
        return self.contents.resume_points.get(name_in(self.path, file), NOT_STARTED)

    def resume_point(self, file: Path) -> ResumePoint:
        """Return where to resume a file, and give it its temporary name again if it was renamed into place."""
        self.require_linked()
        point, temporary = self.recorded(file), temporary_path(file)
        if point.size:
            with as_output_error(file):
                if not os.path.exists(temporary) and os.path.exists(file):
                    os.replace(file, temporary)
        if os.path.exists(temporary):
            return point
        if point.size:
            _log.info("starting over with %s, because its unfinished file was removed", file)
        return NOT_STARTED

    def record(self, file: Path, point: ResumePoint) -> None:
        """Record on the disk how much of a file is written; its bytes must be synced before."""
        self._append({"file": name_in(self.path, file), "resume_point": asdict(point)})
        self.contents.resume_points[name_in(self.path, file)] = point

    def discard(self, file: Path) -> None:
        """Delete a partial file that cannot be trusted."""
        self.record(file, NOT_STARTED)
        with as_output_error(file):
            temporary_path(file).unlink(missing_ok=True)

    def require_linked(self) -> None:
        """Refuse to continue if the journal was removed: the output may belong to another process by now."""
        with as_output_error(self.path):
            is_ours = self._file.is_still_ours()
        if not is_ours:
            raise OutputError(f"{self._output} was removed while it was written. Run the same command again.")

    def remove(self) -> None:
        """End the journal: all files are complete."""
        self.require_linked()
        with as_output_error(self.path):
            self.path.unlink()

    def abandon(self, files: Iterable[Path]) -> bool:
        """After a failure, keep the files that the next process can resume, and delete other unfinished ones.

        Returns:
            Whether nothing is left to resume, so that the journal was deleted too.
        """
        if not self._file.is_still_ours():
            return False
        for file in files:
            if not self.recorded(file).size:
                temporary_path(file).unlink(missing_ok=True)
        if self.contents.is_resumable:
            return False
        self.path.unlink(missing_ok=True)
        return True

    def _append(self, entry: Mapping[str, Any]) -> None:
        self.require_linked()
        line = json.dumps(entry).encode() + b"\n"
        with as_output_error(self.path):
            while line:
                line = line[os.write(self._fd, line) :]
            sync_file(self._fd, self.path)


def _read(fd: int, path: Path) -> bytes:
    with as_output_error(path):
        size = os.fstat(fd).st_size
        if size > MAX_JOURNAL_BYTES:
            raise OutputError(f"{path} has {size:,} bytes, too many for the journal of a conversion. Delete it.")
        data = b""
        while part := os.pread(fd, MAX_JOURNAL_BYTES, len(data)):
            data += part
        return data


@contextmanager
def locked_journal(path: Path, output: Path) -> Iterator[OpenJournal]:
    """Open the journal of ``output``, created if it does not exist, for this process alone.

    Raises:
        BusyError: another process holds it.
        OutputError: it cannot be opened.
    """
    with _refusing(path, output):
        file = open_exclusive(path)
    try:
        yield OpenJournal(path, output, file)
    finally:
        file.close()


def require_unlocked_journal(path: Path, output: Path) -> None:
    """Refuse an output that another process writes; nothing is changed.

    Raises:
        BusyError, OutputError
    """
    with _refusing(path, output):
        require_unlocked(path)


@contextmanager
def _refusing(path: Path, output: Path) -> Iterator[None]:
    with as_output_error(output):
        try:
            yield
        except LockedError as error:
            process = error.holder
            with suppress(OutputError):  # CIFS lets nobody else read a locked file
                process = process or Journal.read(path).process
            raise BusyError(error.message(output, process)) from None
