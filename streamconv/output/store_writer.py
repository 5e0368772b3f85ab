"""Writes one weight file to a store, straight from the buffers.

To resume a file, its bytes are made from the source again, because its sha256 needs them, and only those parts are sent
that the store does not hold.
"""

from contextlib import closing
from dataclasses import replace

from streamconv.errors import CorruptError
from streamconv.files.reader import Reader
from streamconv.logs import logger
from streamconv.output.contents import Contents, Segments, batches
from streamconv.output.hashing import BackgroundHash
from streamconv.output.journal import NOT_STARTED
from streamconv.output.manifest import WrittenFile
from streamconv.output.store import Store, Upload, UploadLostError
from streamconv.output.store_records import FileRecord, record_name, to_bytes
from streamconv.output.writer import Advance
from streamconv.planning.shards import Shard
from streamconv.tensors.checksums import RecordChecks

_log = logger(__name__)


def write_file(
    store: Store,
    shard: Shard,
    earlier: FileRecord | None,
    begun: FileRecord,
    reader: Reader,
    checks: RecordChecks,
    advance: Advance,
) -> tuple[WrittenFile, int]:
    """Write a weight file, or what is missing of the upload that its ``earlier`` record names.

    Args:
        begun: The new record of the file, before anything is written.

    Returns:
        The complete file, and how many of its bytes an interrupted process had uploaded.

    Raises:
        UploadLostError: the upload was completed or aborted meanwhile.
        SourceError: the source cannot be read. If it is damaged or was changed, the upload is deleted.
        StoreError
    """
    name, where = shard.filename, f"{store.address}/{shard.filename}"
    with closing(_open(store, shard, earlier, begun)) as upload:
        try:
            sha256, overflow_count = _send(shard, upload, reader, checks, advance)
        except CorruptError:
            upload.abort()
            store.delete([record_name(name)])
            raise
        stored = upload.complete()
        kept_bytes = upload.kept_bytes
    written = WrittenFile(shard.size, sha256, overflow_count)
    store.put(record_name(name), to_bytes(replace(begun, written=written, version=stored.version)))
    _log.info("wrote %s, %d bytes, sha256 %s", where, shard.size, sha256)
    return written, kept_bytes


def _open(store: Store, shard: Shard, earlier: FileRecord | None, begun: FileRecord) -> Upload:
    """Resume the recorded upload of a file or, if there is none, begin one and record it."""
    name, where = shard.filename, f"{store.address}/{shard.filename}"
    if earlier is not None and earlier.upload and earlier.written is None:
        try:
            upload = store.resume(name, shard.size, earlier.upload, earlier.part_bytes)
            _log.info("resuming the upload of %s", where)
            return upload
        except UploadLostError as error:
            _log.info("%s Starting over.", error)
    upload = store.start(name, shard.size)
    if upload.id:
        store.put(record_name(name), to_bytes(replace(begun, upload=upload.id, part_bytes=upload.part_bytes)))
    return upload


def _send(shard: Shard, upload: Upload, reader: Reader, checks: RecordChecks, advance: Advance) -> tuple[str, int]:
    """Send a file's bytes, and check the source's records.

    Returns:
        The sha256 of the bytes, and how many values a cast made infinite.
    """
    segments: Segments = (shard.header, *shard.tensors)
    contents = Contents(segments, NOT_STARTED, reader, checks, None)
    with BackgroundHash() as digest, contents.proved_by_records(), contents.evaluator:
        contents.prefetch()
        position = 0
        for batch in batches(segments, NOT_STARTED):
            buffer = digest.next_buffer()
            filled, _ = contents.read(batch, buffer)
            digest.update(buffer[:filled])
            upload.write(buffer[:filled])
            position += filled
            advance(position, position <= upload.held_bytes)
        checks.verify_pending()
        for file in contents.files_without_crc():
            reader.open(file).require_unchanged()
        return digest.hexdigest(), contents.overflow_count
