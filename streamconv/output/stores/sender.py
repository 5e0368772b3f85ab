"""Sends the bytes of a weight file to a store, or makes the store copy them from the source.

The store reports the CRC-32 of each part that it copies. Combined, they must match the CRC-32 that the source has for
the record, so a damaged copy is found like a damaged source.
"""

import zlib
from concurrent.futures import Future

from streamconv.errors import CorruptError, OutputError
from streamconv.files.reader import Reader
from streamconv.output.contents import Contents, Segments, batches
from streamconv.output.hashing import BUFFER_BYTES, BackgroundHash
from streamconv.output.journal import NOT_STARTED
from streamconv.output.manifest import WrittenFile
from streamconv.output.stores.store import CopyingUpload, Upload
from streamconv.output.stores.stretches import CopiedRange, Stretch
from streamconv.output.writer import Advance
from streamconv.planning.shards import Shard
from streamconv.tensors.checksums import RecordChecks, combine, read_crc


class WrongCopyError(OutputError):
    """The store's copy of a range differs from the source."""


def send(shard: Shard, upload: Upload, reader: Reader, checks: RecordChecks, advance: Advance) -> WrittenFile:
    """Send all bytes of a file, and check the source's records.

    Raises:
        CorruptError: the source does not match its CRC-32s, or was changed.
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
        _check_sources(contents, reader, checks)
        return WrittenFile(shard.size, digest.hexdigest(), contents.overflow_count)


def send_with_copies(
    stretches: list[Stretch], upload: CopyingUpload, reader: Reader, checks: RecordChecks, advance: Advance
) -> WrittenFile:
    """Send or copy the stretches of a file, and check the source's records.

    Raises:
        CorruptError: the source does not match its CRC-32s, or was changed.
        WrongCopyError
        CannotCopyError: before anything was copied.
    """
    checks.forget_ranges()  # of earlier files; a range that was read before would count as this file's
    segments = [segment for stretch in stretches if not isinstance(stretch, CopiedRange) for segment in stretch]
    contents = Contents(segments, NOT_STARTED, reader, checks, None)
    buffer = memoryview(bytearray(BUFFER_BYTES))
    copies: list[tuple[CopiedRange, Future[int]]] = []
    crcs: list[tuple[int | Future[int], int]] = []  # of the stretches, with their lengths
    position = 0
    with contents.proved_by_records(), contents.evaluator:
        contents.prefetch()
        for stretch in stretches:
            if isinstance(stretch, CopiedRange):
                read = stretch.read
                copy = upload.copy(reader.open(read.record.file), read.range.start, read.info.nbytes)
                copies.append((stretch, copy))
                crcs.append((copy, read.info.nbytes))
                position += read.info.nbytes
                advance(position, False)
                continue
            crc, start = 0, position
            for batch in batches(stretch, NOT_STARTED):
                filled, _ = contents.read(batch, buffer)
                upload.write(buffer[:filled])
                crc = zlib.crc32(buffer[:filled], crc)
                position += filled
                advance(position, False)
            upload.end_part()
            crcs.append((crc, position - start))
        for copied, copy in copies:
            _add_copy(copied, copy.result(), reader, checks)
        _check_sources(contents, reader, checks)
    whole = 0
    for each, length in crcs:
        whole = combine(whole, each if isinstance(each, int) else each.result(), length)
    return WrittenFile(position, "", contents.overflow_count, f"{whole:08x}")


def _check_sources(contents: Contents, reader: Reader, checks: RecordChecks) -> None:
    checks.verify_pending()
    for file in contents.files_without_crc():
        reader.open(file).require_unchanged()


def _add_copy(copied: CopiedRange, crc: int, reader: Reader, checks: RecordChecks) -> None:
    record = copied.read.record
    try:
        checks.add_crc(copied.name, record, copied.read.offset, copied.read.info.nbytes, crc)
    except CorruptError:
        if read_crc(record, reader.open(record.file)) != record.crc32:
            raise
        raise WrongCopyError(
            f"The store's copy of {copied.name} differs from {record.file.location}, by its CRC-32, so it was deleted. "
            "Run the same command again, or convert with --no-server-side-copy (to convert by a plan, save the plan "
            "again with this option)."
        ) from None
