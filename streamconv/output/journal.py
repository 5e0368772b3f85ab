"""The journal of an output that is not finished: lines of JSON, synced one by one.

The first line records what is written from what, further ones the process that writes, and after each sync of a file
how many of its bytes are on the disk, with their sha256. So nothing has to be trusted when the work is resumed: what an
interrupted process left is read back, and must match.
"""

import os
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from streamconv.errors import OutputError, SourceError, SourceMissingError
from streamconv.files.local import read_small
from streamconv.formats.limits import parse_small_json
from streamconv.formats.typed_json import parse
from streamconv.logs import logger
from streamconv.output.manifest import FORMAT_VERSION, Provenance, WrittenFile
from streamconv.output.processes import Process

_log = logger(__name__)

JOURNAL_NAME = ".streamconv-journal"  # in a folder that is written
MAX_JOURNAL_BYTES = 40 << 20  # an entry takes 200 bytes for every 32 MB or more: this is enough for 6 TB


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
class _Entry:
    """A line of a journal: a ``provenance``, a ``process`` and its ``part``, or a ``file`` and its resume point."""

    provenance: Provenance | None = None
    process: Process | None = None
    part: str = ""
    file: str | None = None
    resume_point: ResumePoint | None = None
    format_version: int | None = None


@dataclass
class Journal:
    """The contents of a journal. ``length`` counts the bytes of complete lines: a power cut may leave half of one.

    ``part`` is the part of a plan that the last process was given, such as "3/16"; empty if it writes all files.
    """

    provenance: Provenance | None = None
    process: Process | None = None
    part: str = ""
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
        try:
            raw = read_small(path, MAX_JOURNAL_BYTES)
        except SourceMissingError:
            return cls()
        except SourceError as error:
            if not os.path.lexists(path):  # its folder is a loop of links, below a file, or not accessible
                raise OutputError(f"{error} Choose another place for the output.") from error
            raise OutputError(
                f"{error} It should be the journal of a conversion: delete it and start again."
            ) from error
        return cls.parse(raw, path)

    @classmethod
    def parse(cls, raw: bytes, path: Path) -> "Journal":
        """Parse the complete lines of the journal at ``path``; errors as for `read`."""
        journal = cls()
        for line in BytesIO(raw):
            try:
                if not line.endswith(b"\n"):
                    break
                journal._add(parse_small_json(line), path)
            except ValueError:
                break
            journal.length += len(line)
        return journal

    def size_of(self, name: str) -> int:
        """Return how many bytes of a file it records as written."""
        return self.resume_points.get(name, NOT_STARTED).size

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
            self.process, self.part = entry.process, entry.part
        elif entry.file is not None and entry.resume_point is not None:
            self.resume_points[entry.file] = entry.resume_point
        else:
            raise ValueError("not an entry of a journal")


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder holds an unfinished conversion. An empty journal records none.

    Raises:
        OutputError: the folder cannot be accessed.
    """
    try:
        return os.stat(folder / JOURNAL_NAME).st_size > 0
    except FileNotFoundError:
        return False
    except OSError as error:
        raise OutputError(f"{folder} cannot be read: {error.strerror}.") from error


def name_in(journal: Path, file: Path) -> str:
    """Return the name of a file in a journal: its path from the journal's folder."""
    return os.path.relpath(file, journal.parent)
