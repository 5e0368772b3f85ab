"""The byte mover: a shard's tensors from the source's ranges into a file, in a few buffers.

One thread reads and checks; a second one hashes what was read; a third one writes it; a fourth one syncs, and
marks in the folder's journal how far the file is.

A shard that was interrupted goes on from its mark: what lies before it is read back from the file
instead of from the source, through the same hash and the same CRC-32s. What was cast there has no
CRC-32 in the source. Of it, the mark proves the records that had been read whole, and so been checked;
those that it cut are read, checked and cast once more, and must come to what the file holds.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from streamconv.errors import CorruptError
from streamconv.files.base import ByteRange, FileRef
from streamconv.files.reader import Reader
from streamconv.output.files import OutputFile, PageAligner, atomic_file
from streamconv.output.folder import OutputFolder
from streamconv.output.hashing import BUFFER_BYTES, BackgroundHash
from streamconv.output.journal import NOT_STARTED, ResumePoint
from streamconv.output.manifest import WrittenFile
from streamconv.planning.shards import PIECE_BYTES, Shard
from streamconv.tensors.casts import cast_into
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.expressions import Record, SourceTensor

# Read or written between two marks; a kill costs at most three of these, one that is filled while one is
# synced. Where it goes through the cache, a 64 MB cgroup holds two, and no more dirty pages are ever wanted.
SYNC_BYTES = 32 << 20


def write_shard(
    shard: Shard, folder: OutputFolder, reader: Reader, checks: RecordChecks, advance: Callable[[int, bool], None]
) -> tuple[WrittenFile, int]:
    """Write one shard, or what is missing of it; give the mark of the whole file, and how many bytes were there.

    The file gets its name only after every record that it drew on has matched its CRC-32, or its file
    is found unchanged. ``advance`` is told how many of the shard's bytes are done, and whether the last
    ones were there before.

    Raises:
        SourceError: the source cannot be read; or it is damaged, or was changed: then nothing of the shard is kept.
        OutputError: the output cannot be written.
    """
    kept = folder.journal.resume_point(folder.path / shard.filename)
    if not len(shard.header) < kept.size <= shard.size:
        kept = NOT_STARTED
    for mark in (kept, NOT_STARTED):
        try:
            whole = _write(shard, folder, mark, reader, checks, advance)
            break
        except CorruptError:
            folder.discard(shard.filename)
            if not mark.size:
                raise
            # Else the damage may be in what was written before: once more, all of it from the source.
    folder.journal.record(folder.path / shard.filename, whole)
    return whole.written, mark.size


def _write(
    shard: Shard,
    folder: OutputFolder,
    mark: ResumePoint,
    reader: Reader,
    checks: RecordChecks,
    advance: Callable[[int, bool], None],
) -> ResumePoint:
    synced: Future[None] | None = None
    size = shard.size  # a sum over its tensors
    with (
        atomic_file(folder.path / shard.filename, resume=True) as file,
        BackgroundHash() as digest,
        ThreadPoolExecutor(1, "sync") as syncing,
        ThreadPoolExecutor(1, "disk") as disk,
    ):
        file.allocate(size)
        file.write_at(0, memoryview(shard.header))
        digest.update(shard.header)
        pages = PageAligner(shard.header)
        position = synced_to = pages.position
        is_cast = any(tensor.cast_to for _, tensor in shard.tensors)
        stored, again = (memoryview(bytearray(PIECE_BYTES if is_cast else 0)) for _ in range(2))
        moved, overflow_count = 0, mark.overflow_count
        writes: list[Future[None]] = []  # since the last mark
        read: dict[Record, tuple[int, int]] = {}  # where in the file its first and its last piece went
        _expect(shard, mark, reader)
        for batch in _batches(shard):
            buffer, filled, is_kept = pages.next_window(digest.next_buffer()), 0, position < mark.size
            for name, piece in batch:
                at = position + filled
                part = buffer[filled : filled + piece.target.nbytes]
                if is_kept:
                    file.read_at(at, part)
                    if not piece.cast_to:
                        checks.add(name, piece, part if piece.is_contiguous else None)
                if _is_read(piece, at, is_kept, mark):
                    read[piece.record] = read.get(piece.record, (at, at))[0], at
                    if is_kept:
                        _read(name, piece, again[: len(part)], stored, reader, checks)
                        if bytes(again[: len(part)]) != bytes(part):
                            raise CorruptError(f"{name} in {shard.filename} is not what its source is cast to.")
                    else:
                        overflow_count += _read(name, piece, part, stored, reader, checks)
                        moved += max(piece.info.nbytes, len(part))
                filled += len(part)
            whole_pages = pages.add(filled)
            position = pages.position
            if is_kept:
                digest.update(buffer[:filled])
                synced_to = position
                if position >= mark.size and digest.so_far().result() != mark.sha256:
                    raise CorruptError(f"{shard.filename} is not what its journal says.")
            else:
                writes.append(disk.submit(file.write_pages, *whole_pages))
                digest.update(buffer[:filled], writes[-1])
            if moved >= SYNC_BYTES and position < size:  # a mark of all says that all was settled
                if synced is not None:
                    synced.result()
                unproven = position - _proven(position, read, checks) if is_cast else 0
                reached = ResumePoint(position, "", overflow_count=overflow_count, unproven=unproven)
                synced = syncing.submit(
                    _keep, file, folder, shard.filename, synced_to, reached, digest.so_far(), tuple(writes)
                )
                synced_to, moved = position, 0
                writes.clear()
            advance(position, is_kept)
        if synced is not None:
            synced.result()
        sha256 = digest.hexdigest()
        file.truncate(size)
        if mark.size == size:  # it had its name, and all of it was read back
            checks.skip_pending()
        else:
            checks.verify_pending()
        for source in {tensor.record.file for _, tensor in shard.tensors if tensor.record.crc32 is None}:
            reader.open(source).require_unchanged()
    return ResumePoint(size, sha256, overflow_count=overflow_count)


def _proven(position: int, read: Mapping[Record, tuple[int, int]], checks: RecordChecks) -> int:
    """Up to where the file holds only what was checked, and no record that goes on behind it.

    Who goes on from there reads each record that it meets as a whole, and so can check it.
    """
    proven = min((first for record, (first, _) in read.items() if checks.is_pending(record)), default=position)
    while cut := [first for first, last in read.values() if first < proven <= last]:
        proven = min(cut)
    return proven


def _is_read(piece: SourceTensor, at: int, is_kept: bool, mark: ResumePoint) -> bool:
    """Whether the source is read for what goes to ``at`` in the file."""
    return not is_kept or (bool(piece.cast_to) and at + piece.target.nbytes > mark.size - mark.unproven)


def _read(
    name: str, piece: SourceTensor, part: memoryview, stored: memoryview, reader: Reader, checks: RecordChecks
) -> int:
    """Fill ``part`` from the source, by way of ``stored`` where it is cast; give how many values that made infinite."""
    if not piece.cast_to:
        stored = part
    stored = stored[: piece.info.nbytes]
    checks.add(name, piece, piece.read_into(stored, reader))
    return cast_into(stored, piece.info.dtype, part, piece.cast_to) if piece.cast_to else 0


def _keep(
    file: OutputFile,
    folder: OutputFolder,
    name: str,
    start: int,
    reached: ResumePoint,
    sha256: "Future[str]",
    writes: "tuple[Future[None], ...]",
) -> None:
    """When ``writes`` are done, bring the file's bytes from ``start`` on to the disk, and mark that it is there."""
    for write in writes:
        write.result()  # one that failed is no sync's business: past the cache, only it knows
    file.sync(start, reached.size - start)
    folder.journal.record(folder.path / name, replace(reached, sha256=sha256.result()))


def _expect(shard: Shard, mark: ResumePoint, reader: Reader) -> None:
    """Tell the source's files what will be read of them."""
    for file in {tensor.record.file for _, tensor in shard.tensors}:
        reader.open(file).prefetch(_reads(shard, mark, file))


def _reads(shard: Shard, mark: ResumePoint, file: FileRef) -> Iterator[ByteRange]:
    position = len(shard.header)
    for batch in _batches(shard):
        is_kept = position < mark.size
        for _, piece in batch:
            if piece.record.file == file and _is_read(piece, position, is_kept, mark):
                yield piece.read_range
            position += piece.target.nbytes


def _batches(shard: Shard) -> Iterator[list[tuple[str, SourceTensor]]]:
    """The shard's bytes in order, cut to pieces and these joined to what fills a buffer."""
    batch: list[tuple[str, SourceTensor]] = []
    size = 0
    for name, tensor in shard.tensors:
        for piece in tensor.split(PIECE_BYTES):
            if size + piece.target.nbytes > BUFFER_BYTES:
                yield batch
                batch, size = [], 0
            batch.append((name, piece))
            size += piece.target.nbytes
    if batch:
        yield batch
