"""A folder of one machine, or one that several machines share, into which several processes write.

Each weight file has a journal of its own beside it. Its process holds the journal's lock while it writes the file, and
the journal stays until the folder is finished:

    .model-00001-of-00128.safetensors.streamconv-journal
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streamconv.errors import OutputError
from streamconv.files.reader import Reader
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.output.contents import Segments
from streamconv.output.disk import require_space, require_writable
from streamconv.output.files import as_output_error, make_folder, sync_folder, write_file
from streamconv.output.finished import find_earlier, find_edited
from streamconv.output.folder import remove_conversion
from streamconv.output.identity import differences, shown_differences
from streamconv.output.journal import JOURNAL_NAME, Journal, is_unfinished
from streamconv.output.manifest import MANIFEST_NAME, Manifest, WrittenFile, is_weights
from streamconv.output.open_journal import OpenJournal, locked_journal, require_unlocked_journal
from streamconv.output.ownership import files_with_journals, owned_names, require_free
from streamconv.output.planned import PlannedConversion
from streamconv.output.resumable import journal_path, missing_bytes
from streamconv.output.shared import FileState
from streamconv.output.writer import Advance, written_file
from streamconv.planning.shards import Shard
from streamconv.tensors.checksums import RecordChecks


class SharedFolder:
    """A `SharedOutput` in a folder."""

    def __init__(self, location: Path):
        self.location = location

    def begin(self, planned: PlannedConversion, *, force: bool = False) -> None:
        folder = self.location
        require_writable(folder)
        if force:
            self._remove_earlier(planned)
        self._refuse_single_process()
        self._require_free(planned)
        with as_output_error(folder):
            make_folder(folder)

    def finished(self, planned: PlannedConversion) -> Manifest | None:
        # Not `find_earlier` while there is no manifest: other processes may begin to write meanwhile, which it refuses.
        if Manifest.read(self.location) is None or files_with_journals(self.location):
            return None
        plan = planned.plan
        return find_earlier(self.location, planned.provenance, plan.filenames, planned.small_files).finished

    def write(
        self,
        planned: PlannedConversion,
        shard: Shard,
        reader: Reader,
        checks: RecordChecks,
        advance: Advance,
        part: str = "",
    ) -> tuple[WrittenFile, int]:
        file = self.location / shard.filename
        with locked_journal(journal_path((file,)), file) as journal:
            try:
                self._refuse_single_process()  # again: now that this journal is there, one that begins refuses
                recorded = self._recorded(shard.filename)
                self._require_own(journal.contents, shard.filename, planned)
                if recorded is None and not journal.recorded(file).size and os.path.lexists(file):
                    raise OutputError(f"{file} was not written by streamconv. Choose another folder, or move it away.")
                require_space(file.parent, missing_bytes(file, shard.size, journal.recorded(file).size))
                journal.start(planned.provenance, {shard.filename: recorded} if recorded else {}, part)
                segments: Segments = (shard.header, *shard.tensors)
                with written_file(file, segments, journal, reader, checks, advance) as result:
                    return result
            except BaseException:
                with suppress(OSError):  # a disk on which nothing can be removed; the first error reports it
                    journal.abandon((file,))
                raise

    def states(self, planned: PlannedConversion) -> dict[str, FileState]:
        journals = self._journals(planned)
        return {shard.filename: self._state(shard, journals.get(shard.filename)) for shard in planned.plan.shards}

    def finish(self, planned: PlannedConversion, manifest: Manifest) -> None:
        folder = self.location
        with self._locked():  # one process finishes
            small = {name: file for name, file in manifest.files.items() if not is_weights(name)}
            edited = find_edited(folder, small)
            for name, data in planned.small_files.items():
                if name not in edited and name != INDEX_NAME:
                    write_file(folder / name, data)
            write_file(folder / MANIFEST_NAME, manifest.to_bytes())
            if INDEX_NAME in planned.small_files and INDEX_NAME not in edited:
                write_file(folder / INDEX_NAME, planned.small_files[INDEX_NAME])
            with as_output_error(folder):
                for name in files_with_journals(folder):
                    journal_path((folder / name,)).unlink(missing_ok=True)
        with as_output_error(folder):
            sync_folder(folder)

    @contextmanager
    def _locked(self) -> Iterator[OpenJournal]:
        """Lock the whole folder. Processes that write a weight file hold only that file's lock."""
        with locked_journal(self.location / JOURNAL_NAME, self.location) as journal:
            try:
                yield journal
                journal.remove()
            except BaseException:
                with suppress(OSError):
                    journal.abandon(())
                raise

    def _refuse_single_process(self) -> None:
        if is_unfinished(self.location):
            raise OutputError(
                f"{self.location} holds a conversion that one process began. Finish it with the same command without "
                "--part, --workers and --scheduler, or choose another folder."
            )

    def _require_free(self, planned: PlannedConversion) -> None:
        # Files before journals: each file that another process completes meanwhile has a journal then.
        present = [name for name in planned.plan.filenames if os.path.lexists(self.location / name)]
        journals = self._journals(planned)
        points = {name: point for each in journals.values() for name, point in each.resume_points.items()}
        merged = Journal(planned.provenance if journals else None, resume_points=points)
        require_free(self.location, planned.provenance, present, merged)

    def _journals(self, planned: PlannedConversion) -> dict[str, Journal]:
        """Return the journals of all weight files in the folder by name.

        Raises:
            OutputError: one belongs to another conversion.
        """
        journals = {}
        for name in files_with_journals(self.location):
            journal = Journal.read(journal_path((self.location / name,)))
            self._require_own(journal, name, planned)
            if journal.provenance is not None:
                journals[name] = journal
        return journals

    def _require_own(self, journal: Journal, name: str, planned: PlannedConversion) -> None:
        """Refuse the journal of a weight file of another conversion."""
        if journal.provenance is None or not (other := differences(journal.provenance, planned.provenance)):
            return
        raise OutputError(
            f"{self.location} holds parts of another conversion, of {journal.provenance.title}: for {name}, the "
            f"{shown_differences(other)}. Choose another folder, or delete this one."
        )

    def _recorded(self, name: str) -> WrittenFile | None:
        """Return a weight file as the folder's manifest lists it."""
        manifest = Manifest.read(self.location)
        return manifest.files.get(name) if manifest is not None else None

    def _state(self, shard: Shard, journal: Journal | None) -> FileState:
        file = self.location / shard.filename
        size = os.stat(file).st_size if os.path.exists(file) else 0
        if journal is None:
            recorded = self._recorded(shard.filename)
            return FileState(size, recorded if recorded is not None and recorded.size == size else None)
        point = journal.resume_points.get(shard.filename)
        if point is None or not point.size:
            return FileState(0, None, journal.part)
        is_complete = point.size == size == shard.size
        return FileState(point.size, point.written if is_complete else None, journal.part)

    def _remove_earlier(self, planned: PlannedConversion) -> None:
        """Delete the conversion in the folder, unless it is this same one, unfinished."""
        folder, names = self.location, files_with_journals(self.location)
        if not os.path.isdir(folder):
            return
        with self._locked() as journal:
            journals = {name: Journal.read(journal_path((folder / name,))) for name in names}
            for name in names:
                require_unlocked_journal(journal_path((folder / name,)), folder / name)
            others = [
                each for each in journals.values()
                if each.provenance is not None and differences(each.provenance, planned.provenance)
            ]  # fmt: skip
            if Manifest.read(folder) is not None or others or journal.contents.is_resumable:
                remove_conversion(folder, {*owned_names(folder, journal.contents), *names})
                with as_output_error(folder):
                    for name in names:
                        journal_path((folder / name,)).unlink(missing_ok=True)
