"""Reads the files of an output, and hashes them on the way."""

import zlib

from streamconv.errors import OutputError, TruncatedError
from streamconv.files.base import File
from streamconv.output.hashing import BUFFER_BYTES, BackgroundHash
from streamconv.output.readable import reading_output


def hash_range(file: File, start: int, end: int, digest: BackgroundHash, crc: int | None = None) -> int:
    """Hash a range. Given the CRC-32 ``crc`` of the bytes before it, return that of the file up to ``end``; else 0."""
    for at in range(start, end, BUFFER_BYTES):
        part = digest.next_buffer()[: min(BUFFER_BYTES, end - at)]
        read_output(file, at, part)
        digest.update(part)
        crc = None if crc is None else zlib.crc32(part, crc)
    return crc or 0


def read_output(file: File, at: int, buffer: memoryview) -> None:
    """Read a part of the output.

    Raises:
        OutputError: it cannot be read, or the file has become shorter.
    """
    try:
        with reading_output():
            file.read_at(at, buffer)
    except TruncatedError as error:
        raise changed_output(file.where) from error


def changed_output(where: str) -> OutputError:
    return OutputError(f"{where} was changed while it was verified. Run the same command again.")
