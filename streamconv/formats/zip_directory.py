"""Where the records of a zip lie, for zips as torch.save writes them: stored, one after another, and nothing else.

zipfile reads more kinds of zips than that, in ways in which readers differ (data before the zip, a
comment behind it, directories that contradict their records): a file could then hold one model for
torch and another one for streamconv. It also takes 0.6 kB an entry. The format is described in
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.6 to 4.3.16 and 4.5.3.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from streamconv.errors import CorruptError, NotACheckpointError, SourceError, TruncatedError
from streamconv.files.base import ByteRange, File
from streamconv.formats.limits import MAX_NAME_LENGTH, MAX_TENSORS
from streamconv.tensors.expressions import Record

MAGIC = b"PK\x03\x04"
MAX_DIRECTORY_BYTES = 8 << 20  # 120 bytes an entry
MAX_RECORDS = MAX_TENSORS + 1_000

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_IN_EXTRA = 0xFFFFFFFF  # what a 32-bit field holds where the number is in the 64-bit extra field
_KNOWN_FLAGS = 1 << 3 | 1 << 11  # sizes follow the data, too; the name is in UTF-8
_IS_FOLDER = 0x10  # of the DOS attributes


_Entry = tuple[int, int, int, str]  # the local header's offset, then the record's size, CRC-32 and name


def read_records(file: File, read_local_headers: bool = True) -> dict[str, Record]:
    """Every record of the zip by name, in the directory's order. All are stored, and share no byte.

    Where a record's bytes begin, only its own header says, right before them. Without ``read_local_headers`` these
    are not read where the first one is as torch writes them: the others will be, too.

    Raises:
        TruncatedError: the file has no end.
        NotACheckpointError, CorruptError, SourceError: it is no zip of torch.save, damaged, or too large.
    """
    directory_start, size, count = _find_directory(file)
    if size > MAX_DIRECTORY_BYTES or count > MAX_RECORDS:
        raise SourceError(
            f"{file.where} has a zip directory of {count:,} records in {size:,} bytes, more than {MAX_TENSORS:,} "
            "tensors need. Do not trust this file."
        )
    try:
        entries = list(_entries(file.read(directory_start, size), count, file.where))
    except (struct.error, ValueError) as error:
        raise CorruptError(f"{file.where} has a damaged zip directory: {error}. Fetch it again.") from error
    # torch writes 0 everywhere where torch.serialization.set_crc32_options(False) was called.
    has_crcs = any(crc for _, _, crc, _ in entries)
    records: dict[str, Any] = dict.fromkeys(name for *_, name in entries)
    if len({name.lower() for name in records}) != count:  # torch looks names up without regard to case
        raise CorruptError(f"{file.where} has two records of one name. Do not trust this file.")
    entries.sort(reverse=True)
    if not read_local_headers:
        read_local_headers = not _are_as_torch_writes(file, entries, directory_start)
    if read_local_headers:
        file.prefetch(ByteRange(offset, _LOCAL.size + len(name.encode())) for offset, _, _, name in entries[::-1])
    end = 0
    while entries:  # in the file's order
        offset, size, crc, name = entries.pop()
        if offset < end:
            raise CorruptError(f"{file.where}: its record {name} overlaps another one. Do not trust this file.")
        if read_local_headers:
            where = _range_of(file, name, offset, size, directory_start)
        else:
            where = _range_as_torch_writes(name, offset, size)
        records[name] = Record(file.ref, name, where, crc if has_crcs else None)
        end = where.end
    return records


def read_record(file: File, record: Record, max_bytes: int) -> bytes:
    """A small record, whole and checked."""
    where = record.range
    if where.length > max_bytes:
        raise SourceError(
            f"{file.where}: its record {record.name} has {where.length:,} bytes, and streamconv reads up to "
            f"{max_bytes:,}: {MAX_TENSORS:,} tensors need no more. Do not trust this file."
        )
    data = file.read(where.start, where.length)
    if record.crc32 not in (None, zlib.crc32(data)):
        raise CorruptError(
            f"{file.where}: its record {record.name} does not match its CRC-32: the file is damaged. Fetch it again."
        )
    return data


def _find_directory(file: File) -> tuple[int, int, int]:
    """Where the directory starts, its bytes and its entries, as the records behind it say.

    There is only one way to find them: the end is the file's, without a comment, and the directory
    lies right before it.
    """
    length = min(file.size, _END64.size + _LOCATOR64.size + _END.size)
    before = file.size - length
    tail = file.read(before, length)
    end = length - _END.size
    if end < 0 or tail[end : end + 4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise TruncatedError(
            f"{file.where} begins as a zip but does not end as one of torch.save: something was appended, or the "
            "download was cut short. Fetch it again."
        )
    _, *disks, count, size, start, _ = _END.unpack_from(tail, end)
    if end == _END64.size + _LOCATOR64.size and tail[_END64.size :].startswith(b"PK\x06\x07"):
        _, _, offset, _ = _LOCATOR64.unpack_from(tail, _END64.size)
        magic, rest, _, _, *disks, count, size, start = _END64.unpack_from(tail)
        end = 0
        if magic != b"PK\x06\x06" or rest != _END64.size - 12 or offset != before:
            raise CorruptError(f"{file.where} has a damaged zip directory: its ends differ. Fetch it again.")
    if disks != [0, 0, count] or start + size != before + end:
        raise CorruptError(f"{file.where} has a damaged zip directory: it is not where its end says. Fetch it again.")
    return start, size, count


def _entries(directory: bytes, count: int, where: str) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        (
            magic, _, _, flags, method, _, _, crc, stored, size, name_length, extra_length, comment_length, disk, _,
            attributes, offset,
        ) = _ENTRY.unpack_from(directory, at)  # fmt: skip
        at += _ENTRY.size + name_length
        name = directory[at - name_length : at].decode()
        if magic != b"PK\x01\x02" or disk or name_length > MAX_NAME_LENGTH or not name.isprintable():
            raise ValueError(f"no entry of torch.save ends at byte {at:,}")
        if method or flags & ~_KNOWN_FLAGS:
            raise NotACheckpointError(
                f"{where}: its record {name} is compressed or encrypted, which torch never writes."
            )
        if attributes & _IS_FOLDER or name.endswith("/"):
            raise ValueError(f"its record {name} is marked as a folder, of which torch reads no byte")
        if _IN_EXTRA in (size, stored, offset):
            extra = directory[at : at + extra_length]
            size, stored, offset = _sizes_in(extra, [size, stored, offset])
        if stored != size:
            raise ValueError(f"its record {name} has {stored:,} bytes for {size:,}")
        at += extra_length + comment_length
        yield offset, size, crc, name
    if at != len(directory):
        raise ValueError(f"it has {len(directory):,} bytes, its entries {at:,}")


def _sizes_in(extra: bytes, sizes: list[int]) -> list[int]:
    """The sizes, the 32-bit ones replaced by those of the 64-bit extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{sizes.count(_IN_EXTRA)}Q", extra[: at + 4 + length], at + 4))
            return [next(numbers) if size == _IN_EXTRA else size for size in sizes]
        at += 4 + length
    raise ValueError("a 64-bit size is missing")


def _are_as_torch_writes(file: File, entries: list[_Entry], directory_start: int) -> bool:
    """Whether the first record is, and the others, ``entries`` from the last one on, have the room to be."""
    before = directory_start
    if not entries:
        return True
    for offset, size, _, name in entries:
        if _range_as_torch_writes(name, offset, size).end > before:
            return False
        before = offset
    offset, size, _, name = entries[-1]
    return _range_of(file, name, offset, size, directory_start) == _range_as_torch_writes(name, offset, size)


def _range_as_torch_writes(name: str, offset: int, size: int) -> ByteRange:
    """Behind a header, an extra field of 64-bit numbers where there are any, and one that fills up to 64 bytes.

    As getPadding in torch's caffe2/serialize/inline_container.cc does.
    """
    start = offset + _LOCAL.size + len(name.encode()) + 4
    large = [number >= _IN_EXTRA for number in (size, offset)]
    if any(large):
        start += 4 + 16 * large[0] + 8 * large[1]
    return ByteRange(-(-start // 64) * 64, size)


def _range_of(file: File, name: str, offset: int, size: int, directory_start: int) -> ByteRange:
    """Where the record's bytes lie: behind the local header, whose length is its own."""
    raw = name.encode()
    start = offset + _LOCAL.size + len(raw)
    if start + size > directory_start:
        raise CorruptError(f"{file.where}: its record {name} reaches beyond the zip's records. Fetch it again.")
    header = file.read(offset, _LOCAL.size + len(raw))
    magic, _, flags, method, _, _, _, stored, local_size, name_length, extra_length = _LOCAL.unpack_from(header)
    if (
        magic != MAGIC
        or header[_LOCAL.size :] != raw
        or name_length != len(raw)
        or method
        or flags & ~_KNOWN_FLAGS
        or stored not in (0, _IN_EXTRA, size)
        or local_size not in (0, _IN_EXTRA, size)
        or start + extra_length + size > directory_start
    ):
        raise CorruptError(
            f"{file.where}: the header of its record {name} is not what the zip directory says. Fetch it again, and "
            "do not trust this file."
        )
    return ByteRange(start + extra_length, size)
