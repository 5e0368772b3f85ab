"""TODO output.journal"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.errors import OutputError, SourceError, SourceMissingError
from streamconv.files.local import read_small

JOURNAL_NAME = ".streamconv-journal"


@dataclass(frozen=True)
class ResumePoint:
    """The first ``size`` bytes of a file were written and synced; ``sha256`` is theirs, in hexadecimal.

    ``overflow_count`` counts the values in them that were finite in the source, and infinite when they were cast.
    Of cast values, the last ``unproven`` bytes are of records that had not been read whole yet, and so not been
    held against their CRC-32. ``sent_to`` says where the whole file was sent, and deleted here.
    """

    size: int
    sha256: str
    sent_to: str = ""
    overflow_count: int = 0
    unproven: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For the journal; but for size and sha256, what there is."""
        more = {"sent_to": self.sent_to, "overflow_count": self.overflow_count, "unproven": self.unproven}
        return {"bytes": self.size, "sha256": self.sha256, **{key: value for key, value in more.items() if value}}


NOT_STARTED = ResumePoint(0, "")


@dataclass
class Journal:
    """What an unfinished folder's journal says: which conversion, who writes it, and how far its files are."""

    conversion: dict[str, Any] | None = None
    process: Mapping[str, Any] = field(default_factory=dict)
    marks: dict[str, ResumePoint] = field(default_factory=dict)
    length: int = 0  # in bytes, of the lines that are whole: a power cut may have left half of one

    @property
    def is_begun(self) -> bool:
        """Whether anything was written that can be gone on from."""
        return any(mark.size for mark in self.marks.values())

    @classmethod
    def read(cls, folder: Path) -> "Journal":
        """The folder's; an empty one where there is none."""
        journal = cls()
        path = folder / JOURNAL_NAME
        try:
            raw = read_small(path)
        except SourceMissingError:
            return journal
        except SourceError as error:
            raise OutputError(f"{error} It should be the journal of a conversion: delete it and begin anew.") from error
        for line in raw.splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    break
                journal._add(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                break
            journal.length += len(line)
        return journal

    def _add(self, entry: Any) -> None:
        if "conversion" in entry:
            self.conversion = dict(entry["conversion"])
        elif "process" in entry:
            self.process = dict(entry["process"])
        else:
            counts = int(entry.get("overflow_count", 0)), int(entry.get("unproven", 0))
            mark = ResumePoint(int(entry["bytes"]), str(entry["sha256"]), str(entry.get("sent_to", "")), *counts)
            self.marks[str(entry["file"])] = mark


def resume_points_in(manifest: Mapping[str, Any] | None) -> dict[str, ResumePoint]:
    """A manifest's files; none where it is not as we write it."""
    try:
        files = manifest["files"] if manifest is not None else {}
        return {
            name: ResumePoint(int(file["size"]), str(file["sha256"]), overflow_count=int(file.get("overflow_count", 0)))
            for name, file in files.items()
        }
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return {}
