"""The journal of an output that is not finished: lines of JSON, synced one by one.

The first line records what is written from what, further ones the process that writes, and after each sync of a file
how many of its bytes are on the disk, with their sha256. So nothing has to be trusted when the work is resumed: what an
interrupted process left is read back, and must match.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamconv.errors import OutputError, SourceError, SourceMissingError
from streamconv.files.local import read_small
from streamconv.output.files import as_output_error, is_still_linked, open_exclusive, temporary_path
from streamconv.output.manifest import FORMAT_VERSION, Provenance, WrittenFile
from streamconv.output.typed_json import parse

_log = logging.getLogger(__name__)

JOURNAL_NAME = ".streamconv-journal"  # in a folder that is written


@dataclass(frozen=True)
class ResumePoint:
    """The first ``size`` bytes of a file were written and synced; ``sha256`` is theirs, in hexadecimal.

    ``overflow_count`` counts the values in them that were finite in the source and became infinite when they were cast.
    ``unproven`` counts bytes at their end whose source records had not been read completely, and so had not been
    compared with their CRC-32; only bytes that were cast are counted. ``sent_to`` names the repository that the
    complete file was sent to before it was deleted here.
    """

    size: int
    sha256: str
    sent_to: str = ""
    overflow_count: int = 0
    unproven: int = 0

    @property
    def written(self) -> WrittenFile:
        """The file, if it is complete."""
        return WrittenFile(self.size, self.sha256, self.overflow_count)


NOT_STARTED = ResumePoint(0, "")


@dataclass(frozen=True)
class WritingProcess:
    """The process that holds the lock on a journal."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class _Entry:
    """A line of a journal: a ``provenance``, a ``process``, or a ``file`` and its resume point."""

    provenance: Provenance | None = None
    process: WritingProcess | None = None
    file: str | None = None
    resume_point: ResumePoint | None = None
    format_version: int | None = None


@dataclass
class Journal:
    """The contents of a journal. ``length`` counts the bytes of complete lines: a power cut may leave half of one."""

    provenance: Provenance | None = None
    process: WritingProcess | None = None
    resume_points: dict[str, ResumePoint] = field(default_factory=dict)
    length: int = 0

    @property
    def is_resumable(self) -> bool:
        """True if any file has bytes that need not be written again."""
        return any(point.size for point in self.resume_points.values())

    @classmethod
    def read(cls, path: Path) -> "Journal":
        """Read the complete lines of a journal; return an empty one if there is no such file.

        Raises:
            OutputError: it cannot be read, or was written by another version of streamconv.
        """
        journal = cls()
        try:
            raw = read_small(path)
        except SourceMissingError:
            return journal
        except SourceError as error:
            raise OutputError(
                f"{error} It should be the journal of a conversion: delete it and start again."
            ) from error
        for line in raw.splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    break
                journal._add(json.loads(line), path)
            except (ValueError, RecursionError):
                break
            journal.length += len(line)
        return journal

    def _add(self, line: object, path: Path) -> None:
        if not self.length and isinstance(line, dict) and line.get("format_version") != FORMAT_VERSION:
            raise OutputError(
                f"{path} was written by another version of streamconv: delete it and the unfinished files beside it, "
                "and convert again."
            )
        entry: _Entry = parse(_Entry, line)
        if entry.provenance is not None:
            self.provenance = entry.provenance
        elif entry.process is not None:
            self.process = entry.process
        elif entry.file is not None and entry.resume_point is not None:
            self.resume_points[entry.file] = entry.resume_point
        else:
            raise ValueError("not an entry of a journal")


class OpenJournal:
    """A journal that this process has locked, and the files whose progress it records.

    ``output`` is what they make up, for messages.
    """

    def __init__(self, path: Path, output: Path, fd: int):
        self.path, self._output, self._fd = path, output, fd
        self.contents = Journal.read(path)

    def start(self, provenance: Provenance, complete: Mapping[str, WrittenFile]) -> None:
        """Record the provenance, unless the journal has it already, and that this process writes from now on.

        ``complete`` are files that an earlier process had finished. The journal's name lasts when the folder is synced:
        before the first resume point, together with the file's.
        """
        journal = self.contents
        with as_output_error(self.path):
            os.ftruncate(self._fd, journal.length)
            os.lseek(self._fd, journal.length, os.SEEK_SET)
        points = {
            name: ResumePoint(file.size, file.sha256, overflow_count=file.overflow_count)
            for name, file in complete.items()
        }
        journal.resume_points = {**points, **journal.resume_points}
        if journal.provenance is None:
            self._append({"format_version": FORMAT_VERSION, "provenance": asdict(provenance)})
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._append({"process": asdict(WritingProcess(os.getpid(), platform.node(), now))})

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
        if not is_still_linked(self._fd, self.path):
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
        if not is_still_linked(self._fd, self.path):
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
            os.fsync(self._fd)


def name_in(journal: Path, file: Path) -> str:
    """Return the name of a file in a journal: its path from the journal's folder."""
    return os.path.relpath(file, journal.parent)


@contextmanager
def locked_journal(path: Path, output: Path) -> Iterator[OpenJournal]:
    """Open the journal of ``output``, created if it does not exist, for this process alone.

    Raises:
        OutputError: another process holds it, or it cannot be opened.
    """
    with as_output_error(output):
        try:
            fd = open_exclusive(path)
        except BlockingIOError:
            process = Journal.read(path).process or "another process"
            raise OutputError(f"{output} is being written by {process}. Let it finish, or end it.") from None
    try:
        yield OpenJournal(path, output, fd)
    finally:
        os.close(fd)
