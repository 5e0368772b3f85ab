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
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from streamconv.checkpoint.storage import read_small
from streamconv.errors import OutputError, SourceError, SourceMissingError
from streamconv.manifest import MANIFEST_NAME, differences, read_manifest
from streamconv.output import (
    explained,
    is_named,
    make_folder,
    open_alone,
    require_space,
    sync_folder,
    temporary_path,
    write_file,
)

JOURNAL_NAME = ".streamconv-journal"


@dataclass(frozen=True)
class Mark:
    """The first ``size`` bytes of a file were written and synced; ``sha256`` is theirs, in hexadecimal.

    ``overflowed`` counts the values in them that were finite in the source, and infinite when they were cast.
    Of cast values, the last ``unproven`` bytes are of records that had not been read whole yet, and so not been
    held against their CRC-32. ``sent_to`` says where the whole file was sent, and deleted here.
    """

    size: int
    sha256: str
    sent_to: str = ""
    overflowed: int = 0
    unproven: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For the journal; but for size and sha256, what there is."""
        more = {"sent_to": self.sent_to, "overflowed": self.overflowed, "unproven": self.unproven}
        return {"bytes": self.size, "sha256": self.sha256, **{key: value for key, value in more.items() if value}}


NOTHING = Mark(0, "")


@dataclass
class Journal:
    """What an unfinished folder's journal says: which conversion, who writes it, and how far its files are."""

    conversion: dict[str, Any] | None = None
    process: Mapping[str, Any] = field(default_factory=dict)
    marks: dict[str, Mark] = field(default_factory=dict)
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
            counts = int(entry.get("overflowed", 0)), int(entry.get("unproven", 0))
            mark = Mark(int(entry["bytes"]), str(entry["sha256"]), str(entry.get("sent_to", "")), *counts)
            self.marks[str(entry["file"])] = mark


class OutputFolder:
    """A folder that this process alone writes, until it is finished."""

    def __init__(self, path: Path, fd: int, journal: Journal):
        self.path, self._fd, self._journal = path, fd, journal

    def take_up(self, name: str) -> Mark:
        """How far a file is; where there is something to go on from, it has its temporary name again."""
        self._require_ours()
        file = self.path / name
        mark = self._journal.marks.get(name, NOTHING)
        if mark.size:
            with explained(file):
                if not os.path.exists(temporary_path(file)) and os.path.exists(file):
                    os.replace(file, temporary_path(file))
        return mark if os.path.exists(temporary_path(file)) else NOTHING

    def mark(self, name: str, mark: Mark) -> None:
        """Keep, on the disk, how far a file is; its bytes must be there before."""
        self._append({"file": name, **mark.as_dict()})
        self._journal.marks[name] = mark

    def forget(self, name: str) -> None:
        """What was written of a file is not to be trusted: it is deleted."""
        self.mark(name, NOTHING)
        with explained(self.path / name):
            temporary_path(self.path / name).unlink(missing_ok=True)

    def sent(self, name: str, to: str) -> Mark | None:
        """What a file was that was sent there before; None where it was not."""
        mark = self._journal.marks.get(name, NOTHING)
        return mark if mark.sent_to == to else None

    def let_go(self, name: str, to: str) -> None:
        """A whole file was sent: it is deleted here."""
        self.mark(name, replace(self._journal.marks[name], sent_to=to))
        with explained(self.path / name):
            (self.path / name).unlink()

    def dissolve(self, names: list[str]) -> None:
        """All is elsewhere: nothing of ours stays here, and no folder that holds nothing else."""
        self._require_ours()
        with explained(self.path):
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
        with explained(self.path):
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
        with explained(self.path / JOURNAL_NAME):
            os.ftruncate(self._fd, journal.length)
            os.lseek(self._fd, journal.length, os.SEEK_SET)
        journal.marks = {**marks_of(read_manifest(self.path)), **journal.marks}
        if journal.conversion is None:
            self._append({"conversion": conversion})
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._append({"process": {"pid": os.getpid(), "host": platform.node(), "since": now}})

    def release(self, names: list[str], is_new: bool) -> None:
        """After a failure: keep what the next process can go on from, and nothing else of ours."""
        if not is_named(self._fd, self.path / JOURNAL_NAME):
            return  # the folder is not ours any more
        for name in names:
            if not self._journal.marks.get(name, NOTHING).size:
                temporary_path(self.path / name).unlink(missing_ok=True)
        if not self._journal.is_begun and not any(os.path.exists(self.path / name) for name in names):
            (self.path / JOURNAL_NAME).unlink(missing_ok=True)
            if is_new and not any(self.path.iterdir()):
                self.path.rmdir()

    def _require_ours(self) -> None:
        if not is_named(self._fd, self.path / JOURNAL_NAME):
            raise OutputError(f"{self.path} was removed while it was written. Run the same command again.")

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._require_ours()
        line = json.dumps(entry).encode() + b"\n"
        with explained(self.path / JOURNAL_NAME):
            while line:
                line = line[os.write(self._fd, line) :]
            os.fsync(self._fd)


@contextmanager
def claimed(folder: Path, conversion: Mapping[str, Any], names: list[str], size: int) -> Iterator[OutputFolder]:
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
    with explained(folder):
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
        return open_alone(folder / JOURNAL_NAME)
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
    marks = marks_of(manifest)
    if not all((folder / name).is_file() and (folder / name).stat().st_size == marks[name].size for name in marks):
        return None
    return manifest if marks.keys() == set(names) else None


def marks_of(manifest: Mapping[str, Any] | None) -> dict[str, Mark]:
    """A manifest's files; none where it is not as we write it."""
    try:
        files = manifest["files"] if manifest is not None else {}
        return {
            name: Mark(int(file["size"]), str(file["sha256"]), overflowed=int(file.get("overflowed", 0)))
            for name, file in files.items()
        }
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return {}


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
