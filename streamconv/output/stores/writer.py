"""Writes one weight file to a store, straight from the buffers.

A resumed file is read from the source again, because its sha256 needs all bytes, but only the parts that the store
lacks are sent. Large ranges that the store holds in the source's file may be copied there; see `stretches`.
"""

from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial

from streamconv.errors import CorruptError
from streamconv.files.reader import Reader
from streamconv.logs import logger
from streamconv.output.manifest import WrittenFile
from streamconv.output.stores.records import FileRecord, record_name, to_bytes
from streamconv.output.stores.sender import WrongCopyError, send, send_with_copies
from streamconv.output.stores.store import CannotCopyError, Copier, CopyingUpload, Store, Upload, UploadLostError
from streamconv.output.stores.stretches import cut_into_stretches
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
    *,
    server_side_copy: bool,
) -> tuple[WrittenFile, int]:
    """Write a weight file, or what is missing of the upload that its ``earlier`` record names.

    Args:
        begun: The new record of the file, before anything is written.
        server_side_copy: Let the store copy what it has in the source's file, if it can.

    Returns:
        The complete file, and how many of its bytes an interrupted process had uploaded.

    Raises:
        UploadLostError: the upload was completed or aborted meanwhile.
        SourceError: the source cannot be read. If it is damaged or was changed, the upload is deleted.
        WrongCopyError: the store copied wrong bytes. The upload is deleted.
        StoreError
    """
    copier, name = store.copier if server_side_copy else None, shard.filename
    stretches = cut_into_stretches(shard, copier.can_copy, copier.part_bytes(shard.size)) if copier is not None else []
    if copier is not None and stretches:
        try:
            with closing(_open_copying(copier, store, shard, earlier, begun)) as copying:
                sending = partial(send_with_copies, stretches, copying, reader, checks, advance)
                return _complete(store, name, begun, copying, sending), 0
        except CannotCopyError:
            checks.forget_ranges()
            earlier = None
    with closing(_open(store, shard, earlier, begun)) as upload:
        written = _complete(store, name, begun, upload, partial(send, shard, upload, reader, checks, advance))
        return written, upload.kept_bytes


def _complete(
    store: Store, name: str, begun: FileRecord, upload: Upload, send_all: Callable[[], WrittenFile]
) -> WrittenFile:
    """Send the file's bytes, make the object appear, and record it."""
    try:
        written = send_all()
    except (CorruptError, WrongCopyError, CannotCopyError):
        upload.abort()
        store.delete([record_name(name)])
        raise
    stored = upload.complete()
    store.put(record_name(name), to_bytes(replace(begun, written=written, version=stored.version)))
    checksum = f"sha256 {written.sha256}" if written.sha256 else f"CRC-32 {written.crc32}"
    _log.info("wrote %s/%s, %d bytes, %s", store.address, name, written.size, checksum)
    return written


def _open(store: Store, shard: Shard, earlier: FileRecord | None, begun: FileRecord) -> Upload:
    """Resume the recorded upload of a file or, if there is none, begin one and record it."""
    name, where = shard.filename, f"{store.address}/{shard.filename}"
    if earlier is not None and earlier.upload and earlier.written is None and not earlier.has_copies:
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


def _open_copying(
    copier: Copier, store: Store, shard: Shard, earlier: FileRecord | None, begun: FileRecord
) -> CopyingUpload:
    """Do the same as `_open` for an upload in which the store copies some parts."""
    name = shard.filename
    if earlier is not None and earlier.upload and earlier.written is None and earlier.has_copies:
        with suppress(UploadLostError):
            return copier.resume(name, shard.size, earlier.upload)
    upload = copier.start(name, shard.size)
    store.put(record_name(name), to_bytes(replace(begun, upload=upload.id, has_copies=True)))
    return upload
