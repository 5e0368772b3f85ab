"""The byte mover: a shard's tensors from the source's ranges into a file, in a few buffers.

One thread reads, checks and writes; a second one hashes what was written, a third one syncs. Two
threads that write one file wait for its lock instead of working, and buffers beyond the CPU's
cache make every step slower, so there is one writer and a ring of small buffers.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from streamconv.crc import RecordChecks
from streamconv.output import whole_file
from streamconv.plan import PIECE_BYTES, Shard
from streamconv.tensors import SourceTensor

BUFFER_BYTES, RING_BUFFERS = 1 << 20, 8  # what the hash may be behind: less costs time, more costs memory
SYNC_BYTES = 32 << 20  # a 64 MB cgroup holds two of these, and no more dirty pages are ever wanted


def write_shard(shard: Shard, path: Path, checks: RecordChecks, advance: Callable[[int], None]) -> str:
    """Write one shard, whole or not at all, and give its sha256 in hexadecimal.

    The file gets its name only after every record that it drew on has matched its CRC-32.
    ``advance`` is called with the number of bytes that each step added.

    Raises:
        SourceError: the source cannot be read, or is damaged.
        OutputError: the output cannot be written.
    """
    digest = hashlib.sha256(shard.header)
    ring = deque(memoryview(bytearray(BUFFER_BYTES)) for _ in range(RING_BUFFERS))
    hashed: deque[Future[None]] = deque()
    synced: Future[None] | None = None
    with (
        whole_file(path) as file,
        ThreadPoolExecutor(1, "hash") as hashing,
        ThreadPoolExecutor(1, "sync") as syncing,
    ):
        file.allocate(shard.size)
        file.write_at(0, memoryview(shard.header))
        position = synced_to = len(shard.header)
        for batch in _batches(shard):
            if len(hashed) == RING_BUFFERS:
                hashed.popleft().result()
            ring.rotate()
            filled = 0
            for name, piece in batch:
                part = ring[0][filled : filled + piece.info.nbytes]
                piece.read_into(part)
                checks.add(name, piece, part)
                file.write_at(position + filled, part)
                filled += len(part)
            hashed.append(hashing.submit(digest.update, ring[0][:filled]))
            position += filled
            if position - synced_to >= SYNC_BYTES:
                if synced is not None:
                    synced.result()
                synced = syncing.submit(file.sync, synced_to, position - synced_to)
                synced_to = position
            advance(filled)
        for future in (*hashed, *([synced] if synced else [])):
            future.result()
        checks.settle()
    return digest.hexdigest()


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
