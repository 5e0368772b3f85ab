"""The byte mover: a shard's tensors from the source's ranges into a file, in a few buffers.

One thread reads, checks and writes; a second one hashes what was written, a third one syncs and
marks in the folder's journal how far the file is. Two threads that write one file wait for its lock
instead of working, so there is one writer.

A shard that was interrupted goes on from its mark: what lies before it is read back from the file
instead of from the source, through the same hash and the same CRC-32s.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from streamconv.crc import RecordChecks
from streamconv.errors import CorruptError
from streamconv.folder import NOTHING, Mark, OutputFolder
from streamconv.hashing import BUFFER_BYTES, BackgroundHash
from streamconv.output import OutputFile, whole_file
from streamconv.plan import PIECE_BYTES, Shard
from streamconv.tensors import ByteRange, ByteSource, SourceTensor

# Between two marks; a kill costs at most three of these, one that is filled while one is synced. A 64 MB
# cgroup holds two, and no more dirty pages are ever wanted.
SYNC_BYTES = 32 << 20


def write_shard(
    shard: Shard, folder: OutputFolder, checks: RecordChecks, advance: Callable[[int, bool], None]
) -> tuple[str, int]:
    """Write one shard, or what is missing of it; give its sha256 in hexadecimal, and how many bytes were there.

    The file gets its name only after every record that it drew on has matched its CRC-32, or its file
    is found unchanged. ``advance`` is told how many of the shard's bytes are done, and whether the last
    ones were there before.

    Raises:
        SourceError: the source cannot be read; or it is damaged, or was changed: then nothing of the shard is kept.
        OutputError: the output cannot be written.
    """
    kept = folder.take_up(shard.filename)
    if not len(shard.header) < kept.size <= shard.size:
        kept = NOTHING
    for mark in (kept, NOTHING):
        try:
            sha256 = _write(shard, folder, mark, checks, advance)
            break
        except CorruptError:
            folder.forget(shard.filename)
            if not mark.size:
                raise
            # Else the damage may be in what was written before: once more, all of it from the source.
    folder.mark(shard.filename, Mark(shard.size, sha256))
    return sha256, mark.size


def _write(
    shard: Shard, folder: OutputFolder, mark: Mark, checks: RecordChecks, advance: Callable[[int, bool], None]
) -> str:
    synced: Future[None] | None = None
    with (
        whole_file(folder.path / shard.filename, resume=True) as file,
        BackgroundHash() as digest,
        ThreadPoolExecutor(1, "sync") as syncing,
    ):
        file.allocate(shard.size)
        file.write_at(0, memoryview(shard.header))
        digest.update(shard.header)
        position = synced_to = len(shard.header)
        _expect(shard, mark)
        for batch in _batches(shard):
            buffer, filled, is_kept = digest.next_buffer(), 0, position < mark.size
            for name, piece in batch:
                part = buffer[filled : filled + piece.info.nbytes]
                if is_kept:
                    file.read_at(position + filled, part)
                else:
                    piece.read_into(part)
                    file.write_at(position + filled, part)
                checks.add(name, piece, part)
                filled += len(part)
            digest.update(buffer[:filled])
            position += filled
            if is_kept:
                synced_to = position
                if position >= mark.size and digest.so_far().result() != mark.sha256:
                    raise CorruptError(f"{shard.filename} is not what its journal says.")
            elif position - synced_to >= SYNC_BYTES:
                if synced is not None:
                    synced.result()
                synced = syncing.submit(_keep, file, folder, shard.filename, synced_to, position, digest.so_far())
                synced_to = position
            advance(position, is_kept)
        if synced is not None:
            synced.result()
        sha256 = digest.hexdigest()
        if mark.size == shard.size:  # it had its name, and all of it was read back
            checks.trust()
        else:
            checks.settle()
        for source in {tensor.record.file for _, tensor in shard.tensors if tensor.record.crc32 is None}:
            source.require_unchanged()
    return sha256


def _keep(file: OutputFile, folder: OutputFolder, name: str, start: int, end: int, sha256: "Future[str]") -> None:
    """Bring the file's bytes from ``start`` to ``end`` to the disk, and mark that it is as far."""
    file.sync(start, end - start)
    folder.mark(name, Mark(end, sha256.result()))


def _expect(shard: Shard, mark: Mark) -> None:
    """Tell the source's files what will be read of them."""
    for file in {tensor.record.file for _, tensor in shard.tensors}:
        file.expect(_reads(shard, mark, file))


def _reads(shard: Shard, mark: Mark, file: ByteSource) -> Iterator[ByteRange]:
    position = len(shard.header)
    for batch in _batches(shard):
        if position >= mark.size:
            yield from (piece.read_range for _, piece in batch if piece.record.file is file)
        position += sum(piece.info.nbytes for _, piece in batch)


def _batches(shard: Shard) -> Iterator[list[tuple[str, SourceTensor]]]:
    """The shard's bytes in order, cut to pieces and these joined to what fills a buffer."""
    batch: list[tuple[str, SourceTensor]] = []
    size = 0
    for name, tensor in shard.tensors:
        for piece in tensor.split(PIECE_BYTES):
            if size + piece.info.nbytes > BUFFER_BYTES:
                yield batch
                batch, size = [], 0
            batch.append((name, piece))
            size += piece.info.nbytes
    if batch:
        yield batch
