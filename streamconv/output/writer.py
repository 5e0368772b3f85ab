"""Writes segments, most of them tensors of a source, into a file through a few buffers.

One thread reads and checks, a second one hashes the data, a third one writes it, and a fourth one syncs it and records
in the journal how much of the file is on the disk.

An interrupted file is resumed at its resume point: the bytes before it are read back from the file instead of from the
source, through the same hash and the same CRC-32s. Values that were cast have no CRC-32 in the source. The resume point
vouches for those whose records had been read and checked completely. A record that was only partly read is read,
checked and cast again, and must give the bytes that the file holds.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import TracebackType

from streamconv.errors import CorruptError
from streamconv.files.reader import Reader
from streamconv.logs import logger
from streamconv.output.contents import Contents, Segments, batches, size_of
from streamconv.output.files import OutputFile, PageAligner, atomic_file
from streamconv.output.folder import OutputFolder
from streamconv.output.hashing import BackgroundHash
from streamconv.output.journal import NOT_STARTED, ResumePoint
from streamconv.output.manifest import WrittenFile
from streamconv.output.open_journal import OpenJournal
from streamconv.planning.shards import Shard
from streamconv.progress import Progress
from streamconv.tensors.checksums import RecordChecks

# Bytes between resume points. A kill loses at most three intervals: one filling, one syncing, one queued. If writes go
# through the page cache, two fit in a 64 MB cgroup.
SYNC_BYTES = 32 << 20

_log = logger(__name__)

Advance = Callable[[int, bool], None]
"""Called with the number of a file's bytes that are done, and whether an earlier process had written the last ones."""


def write_shard(
    shard: Shard, folder: OutputFolder, reader: Reader, checks: RecordChecks, advance: Advance
) -> tuple[WrittenFile, int]:
    """Write a safetensors file, or the rest of it; for results and errors, see `written_file`."""
    segments: Segments = (shard.header, *shard.tensors)
    with written_file(folder.path / shard.filename, segments, folder.journal, reader, checks, advance) as result:
        return result


def with_progress(shards: Sequence[Shard], progress: Progress) -> Iterator[tuple[Shard, Advance]]:
    """Yield each shard with a callback for `write_shard` that reports its progress as progress of all shards."""
    sizes = [shard.size for shard in shards]
    total = sum(sizes)

    def advance(shard: Shard, before: int, position: int, is_kept: bool) -> None:
        progress(f"{'checking' if is_kept else 'writing'} {shard.filename}", before + position, total, "bytes")

    for shard, before in zip(shards, accumulate(sizes, initial=0)):  # noqa: B905 - the last sum is of all shards
        yield shard, partial(advance, shard, before)


@contextmanager
def written_file(
    path: Path, segments: Segments, journal: OpenJournal, reader: Reader, checks: RecordChecks, advance: Advance
) -> Iterator[tuple[WrittenFile, int]]:
    """Write a file, or the rest of it. It is renamed into place when the block ends well.

    Yields:
        The file, once it is complete, and the number of its bytes that an interrupted process had written. Every source
        record has matched its CRC-32 then; if it has none, its file has not changed.

    Raises:
        SourceError: the source cannot be read. If it is damaged or was changed, the partial file is deleted.
        OutputError: the file cannot be written.
    """
    writer = _FileWriter(path, segments, journal, reader, checks, advance)
    kept = journal.resume_point(path)
    if not 0 < kept.size <= writer.size:
        kept = NOT_STARTED
    if kept.size:
        _log.info("resuming %s at byte %d of %d", path, kept.size, writer.size)
    with ExitStack() as stack:
        for point in (kept, NOT_STARTED):
            try:
                with ExitStack() as opened:
                    complete = writer.write(opened.enter_context(atomic_file(path, resume=True)), point)
                    stack.push(opened.pop_all())
                break
            except CorruptError as error:
                journal.discard(path)
                if not point.size:
                    raise
                # The damage may be in the bytes that were kept.
                _log.warning("%s Writing all of %s again.", error, path)
                checks.forget_ranges()
        yield complete.written, point.size
    _log.info("wrote %s, %d bytes, sha256 %s", path, complete.size, complete.sha256)


class _FileWriter:
    """Writes one file; the arguments are those of `written_file`. ``size`` is the file's, in bytes."""

    def __init__(
        self,
        path: Path,
        segments: Segments,
        journal: OpenJournal,
        reader: Reader,
        checks: RecordChecks,
        advance: Advance,
    ):
        self._path, self._segments, self._journal = path, segments, journal
        self._reader, self._checks, self._advance = reader, checks, advance
        self.size = sum(map(size_of, segments))

    def write(self, file: OutputFile, point: ResumePoint) -> ResumePoint:
        """Check the bytes before ``point``, and write the rest."""
        file.allocate(self.size)
        contents = Contents(self._segments, point, self._reader, self._checks, self._path.parent)
        with (
            BackgroundHash() as digest,
            _Marker(file, self._path, self._journal, point.size) as marker,
            ThreadPoolExecutor(1, "disk") as disk,
            contents.proved_by_records(),
            contents.evaluator,
        ):
            pages = PageAligner()
            contents.prefetch()
            for batch in batches(self._segments, point):
                buffer, is_kept = pages.next_window(digest.next_buffer()), batch[0].is_kept
                if is_kept:
                    filled = contents.read_back(batch, buffer, file)
                    pages.add(filled)
                    digest.update(buffer[:filled])
                    if pages.position >= point.size and digest.so_far().result() != point.sha256:
                        raise CorruptError(f"{self._path.name} differs from what its journal records.")
                else:
                    filled, moved = contents.read(batch, buffer)
                    write = disk.submit(file.write_pages, *pages.add(filled))
                    digest.update(buffer[:filled], write)
                    marker.add(write, moved)
                    # Not at the end: a resume point there means that everything was checked.
                    if marker.is_due and pages.position < self.size:
                        marker.mark(contents.resume_point(pages.position), digest.so_far())
                self._advance(pages.position, is_kept)
            marker.wait()
            sha256 = digest.hexdigest()
            file.truncate(self.size)
        self._check_rest(point, contents)
        file.sync(0, self.size)
        complete = ResumePoint(self.size, sha256, overflow_count=contents.overflow_count)
        self._journal.record(self._path, complete)
        return complete

    def _check_rest(self, point: ResumePoint, contents: "Contents") -> None:
        """Compare the CRC-32s that are still pending, and require that files with other records did not change."""
        if point.size == self.size:  # an earlier process had checked everything
            self._checks.skip_pending()
        else:
            self._checks.verify_pending()
        for file in contents.files_without_crc():
            self._reader.open(file).require_unchanged()


class _Marker:
    """Syncs a file in a thread of its own, and records in the journal how much of it is on the disk."""

    def __init__(self, file: OutputFile, path: Path, journal: OpenJournal, position: int):
        self._file, self._path, self._journal = file, path, journal
        self._synced_to, self._moved = position, 0
        self._writes: list[Future[None]] = []  # since the last resume point
        self._syncing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "sync")

    def __enter__(self) -> "_Marker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def add(self, write: "Future[None]", moved: int) -> None:
        """Note that the next bytes are being written, for which ``moved`` bytes were read or written."""
        self._writes.append(write)
        self._moved += moved

    @property
    def is_due(self) -> bool:
        """True if it is time for a resume point."""
        return self._moved >= SYNC_BYTES

    def mark(self, point: ResumePoint, sha256: "Future[str]") -> None:
        """Record ``point`` once the file's bytes up to it are synced; first wait for the previous point."""
        self.wait()
        self._syncing = self._thread.submit(self._sync, self._synced_to, point, sha256, tuple(self._writes))
        self._synced_to, self._moved = point.size, 0
        self._writes.clear()

    def wait(self) -> None:
        """Wait until the last resume point is recorded; an error that prevented it is raised here."""
        if self._syncing is not None:
            self._syncing.result()

    def _sync(self, start: int, point: ResumePoint, sha256: "Future[str]", writes: "tuple[Future[None], ...]") -> None:
        for write in writes:
            write.result()  # a sync does not report a failed write that bypassed the page cache
        self._file.sync(start, point.size - start)
        self._journal.record(self._path, replace(point, sha256=sha256.result()))
