"""The byte mover: a shard's tensors from the source's ranges into a file, in a few buffers.

One thread reads, checks and writes; a second one hashes what was written, a third one syncs. Two
threads that write one file wait for its lock instead of working, so there is one writer.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from streamconv.crc import RecordChecks
from streamconv.hashing import BUFFER_BYTES, BackgroundHash
from streamconv.output import whole_file
from streamconv.plan import PIECE_BYTES, Shard
from streamconv.tensors import SourceTensor

SYNC_BYTES = 32 << 20  # a 64 MB cgroup holds two of these, and no more dirty pages are ever wanted


def write_shard(shard: Shard, path: Path, checks: RecordChecks, advance: Callable[[int], None]) -> str:
    """Write one shard, whole or not at all, and give its sha256 in hexadecimal.

    The file gets its name only after every record that it drew on has matched its CRC-32.
    ``advance`` is called with the number of bytes that each step added.

    Raises:
        SourceError: the source cannot be read, or is damaged.
        OutputError: the output cannot be written.
    """
    synced: Future[None] | None = None
    with (
        whole_file(path) as file,
        BackgroundHash() as digest,
        ThreadPoolExecutor(1, "sync") as syncing,
    ):
        file.allocate(shard.size)
        file.write_at(0, memoryview(shard.header))
        digest.update(shard.header)
        position = synced_to = len(shard.header)
        for batch in _batches(shard):
            buffer, filled = digest.next_buffer(), 0
            for name, piece in batch:
                part = buffer[filled : filled + piece.info.nbytes]
                piece.read_into(part)
                checks.add(name, piece, part)
                file.write_at(position + filled, part)
                filled += len(part)
            digest.update(buffer[:filled])
            position += filled
            if position - synced_to >= SYNC_BYTES:
                if synced is not None:
                    synced.result()
                synced = syncing.submit(file.sync, synced_to, position - synced_to)
                synced_to = position
            advance(filled)
        if synced is not None:
            synced.result()
        sha256 = digest.hexdigest()
        checks.settle()
    return sha256


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
