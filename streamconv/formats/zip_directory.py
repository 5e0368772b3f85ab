"""The records of a zip, for zips as torch.save and numpy.savez write them: stored, one after another, nothing else.

Python's zipfile accepts more kinds of zips, which readers interpret in different ways (data before the zip, a
comment after it, a directory that contradicts the local headers): such a file could hold one model for torch and
another one for streamconv. zipfile also takes 0.6 kB of memory per entry. The format is described in
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT; the numbers below are its sections.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from streamconv.errors import CorruptError, NotACheckpointError, SourceError, TruncatedError
from streamconv.files.base import ByteRange, File
from streamconv.formats.foreign.zips import describe_zip, repack_advice
from streamconv.formats.limits import MAX_NAME_LENGTH, MAX_TENSORS
from streamconv.tensors.expressions import Record

MAGIC = b"PK\x03\x04"
MAX_DIRECTORY_BYTES = 8 << 20  # 120 bytes per entry
MAX_RECORDS = MAX_TENSORS + 1_000

# Fields that are not needed are skipped (x); the names of the others are where they are unpacked.
_LOCAL_HEADER = struct.Struct("<4s2xHH8xLLHH")  # 4.3.7: not the version, time, date and CRC-32
_ENTRY = struct.Struct("<4s4xHH4xLLLHHHH2xLL")  # 4.3.12: not the versions, time, date and internal attributes
_END = struct.Struct("<4sHHHHLL2x")  # 4.3.16: not the comment's length
_LOCATOR64 = struct.Struct("<4s4xQ4x")  # 4.3.15: not the disks
_END64 = struct.Struct("<4sQ4xLLQQQQ")  # 4.3.14: not the versions
_IN_EXTRA = 0xFFFFFFFF  # a 32-bit field has this value if the number is in the 64-bit extra field (4.5.3)
_KNOWN_FLAGS = 1 << 3 | 1 << 11  # the sizes are repeated after the data; the name is in UTF-8
_IS_FOLDER = 0x10  # in the DOS attributes


class _Entry(NamedTuple):
    """A directory entry: ``offset`` is that of the local header, ``size`` the record's, both in bytes.

    ``fault`` is the reason why torch would not have written it.
    """

    offset: int
    size: int
    crc32: int
    name: str
    fault: str = ""


def read_records(file: File, read_local_headers: bool = True) -> dict[str, Record]:
    """Return every record of the zip by name, in the directory's order. All are stored, and none overlap.

    Only a record's local header, right before its bytes, shows where they begin. If ``read_local_headers`` is False
    and the first record begins where torch would put it, the others are expected to, and their headers are not read.

    Raises:
        TruncatedError: the end of the zip is missing.
        NotACheckpointError, CorruptError, SourceError: it is not a zip of torch.save, is damaged, or is too large.
    """
    directory_start, size, count = _find_directory(file)
    if size > MAX_DIRECTORY_BYTES or count > MAX_RECORDS:
        raise SourceError(
            f"{file.where} has a zip directory of {count:,} records in {size:,} bytes, more than {MAX_TENSORS:,} "
            "tensors need. Do not trust this file."
        )
    try:
        entries = list(_read_entries(file.read(directory_start, size), count))
    except (struct.error, ValueError) as error:
        raise CorruptError(f"{file.where} has a damaged zip directory: {error}. Fetch it again.") from error
    _refuse_others(entries, file.where)
    # After torch.serialization.set_crc32_options(False), torch writes 0 for every CRC-32.
    has_crcs = any(entry.crc32 for entry in entries)
    records: dict[str, Any] = dict.fromkeys(entry.name for entry in entries)
    if len({name.lower() for name in records}) != count:  # torch ignores case when it looks up a name
        raise CorruptError(f"{file.where} has two records of the same name. Do not trust this file.")
    entries.sort(reverse=True)
    if not read_local_headers:
        read_local_headers = not _have_torch_layout(file, entries, directory_start)
    if read_local_headers:
        file.prefetch(ByteRange(entry.offset, _LOCAL_HEADER.size + len(entry.name.encode())) for entry in entries[::-1])
    end = 0
    while entries:  # from the lowest offset to the highest
        entry = entries.pop()
        if entry.offset < end:
            raise CorruptError(f"{file.where}: its record {entry.name} overlaps another one. Do not trust this file.")
        data_range = _read_data_range(file, entry, directory_start) if read_local_headers else _torch_data_range(entry)
        records[entry.name] = Record(file.ref, entry.name, data_range, entry.crc32 if has_crcs else None)
        end = data_range.end
    return records


def _find_directory(file: File) -> tuple[int, int, int]:
    """Return the directory's offset, its size in bytes and its number of entries, from the records after it.

    There is only one place for these: they end with the file, without a comment, and the directory lies right before
    them. A zip64 has three of them, of which the first has the 64-bit fields.
    """
    length = min(file.size, _END64.size + _LOCATOR64.size + _END.size)
    tail_start = file.size - length
    tail = file.read(tail_start, length)
    end = length - _END.size
    if not any(tail):
        raise TruncatedError(f"{file.where} ends with nothing but zeros: its download did not finish. Fetch it again.")
    if end < 0 or tail[end : end + 4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise TruncatedError(
            f"{file.where} begins as a zip but does not end as one of torch.save: something was appended, or the "
            "save, copy or download was cut short. Fetch it again, or use another checkpoint."
        )
    _, disk, directory_disk, disk_count, count, size, start = _END.unpack_from(tail, end)
    if end == _END64.size + _LOCATOR64.size and tail[_END64.size :].startswith(b"PK\x06\x07"):
        _, end64_offset = _LOCATOR64.unpack_from(tail, _END64.size)
        magic, rest_size, disk, directory_disk, disk_count, count, size, start = _END64.unpack_from(tail)
        end = 0
        if magic != b"PK\x06\x06" or rest_size != _END64.size - 12 or end64_offset != tail_start:
            raise CorruptError(
                f"{file.where} has a damaged zip directory: its 64-bit end is not valid. Fetch it again."
            )
    if disk or directory_disk or disk_count != count or start + size != tail_start + end:
        raise CorruptError(
            f"{file.where} has a damaged zip directory: it is not at the offset in its end record. Fetch it again."
        )
    return start, size, count


def _refuse_others(entries: Sequence[_Entry], where: str) -> None:
    """Refuse zips of other kinds by what they are, and those of this kind that were packed again."""
    names = [entry.name for entry in entries]
    if other := describe_zip(names):
        raise NotACheckpointError(f"{where} {other}")
    for entry in entries:
        if entry.fault:
            raise NotACheckpointError(f"{where}: its record {entry.name} {entry.fault}. {repack_advice(names)}")


def _read_entries(directory: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        (
            magic,
            flags,
            method,
            crc32,
            stored_size,
            size,
            name_length,
            extra_length,
            comment_length,
            disk,
            attributes,
            offset,
        ) = _ENTRY.unpack_from(directory, at)
        at += _ENTRY.size + name_length
        name = directory[at - name_length : at].decode()
        if magic != b"PK\x01\x02" or disk or name_length > MAX_NAME_LENGTH or not name.isprintable():
            raise ValueError(f"the entry that ends at byte {at:,} is not one of torch.save")
        fault = ""
        if method or flags & ~_KNOWN_FLAGS:
            fault = "is compressed or encrypted"
        elif attributes & _IS_FOLDER or name.endswith("/"):
            fault = "is marked as a folder"
        if _IN_EXTRA in (size, stored_size, offset):
            size, stored_size, offset = _sizes_in_extra(directory[at : at + extra_length], [size, stored_size, offset])
        if stored_size != size and not fault:
            raise ValueError(f"its record {name} has {stored_size:,} bytes for {size:,}")
        at += extra_length + comment_length
        yield _Entry(offset, size, crc32, name, fault)
    if at != len(directory):
        raise ValueError(f"it has {len(directory):,} bytes, its entries {at:,}")


def _sizes_in_extra(extra: bytes, sizes: list[int]) -> list[int]:
    """Return ``sizes`` with the numbers from the 64-bit extra field for those that are `_IN_EXTRA`."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{sizes.count(_IN_EXTRA)}Q", extra[: at + 4 + length], at + 4))
            return [next(numbers) if size == _IN_EXTRA else size for size in sizes]
        at += 4 + length
    raise ValueError("a 64-bit size is missing")


def _have_torch_layout(file: File, entries: list[_Entry], directory_start: int) -> bool:
    """Return whether the first record begins where torch would put it, and all others could.

    ``entries`` are in reverse order. Only the first record's header is read.
    """
    next_offset = directory_start
    for entry in entries:
        if _torch_data_range(entry).end > next_offset:
            return False
        next_offset = entry.offset
    return not entries or _read_data_range(file, entries[-1], directory_start) == _torch_data_range(entries[-1])


def _torch_data_range(entry: _Entry) -> ByteRange:
    """Compute where torch puts a record's bytes: after the header and an extra field that aligns them to 64 bytes.

    See getPadding in torch's caffe2/serialize/inline_container.cc. Sizes of 4 GB and more have their own extra field.
    """
    start = entry.offset + _LOCAL_HEADER.size + len(entry.name.encode()) + 4
    has_large_size, has_large_offset = entry.size >= _IN_EXTRA, entry.offset >= _IN_EXTRA
    if has_large_size or has_large_offset:
        start += 4 + 16 * has_large_size + 8 * has_large_offset
    return ByteRange(-(-start // 64) * 64, entry.size)


def _read_data_range(file: File, entry: _Entry, directory_start: int) -> ByteRange:
    """Read where a record's bytes are: after its local header, whose extra field has a length of its own."""
    raw_name = entry.name.encode()
    extra_start = entry.offset + _LOCAL_HEADER.size + len(raw_name)
    if extra_start + entry.size > directory_start:
        raise CorruptError(f"{file.where}: its record {entry.name} extends beyond the zip's records. Fetch it again.")
    header = file.read(entry.offset, _LOCAL_HEADER.size + len(raw_name))
    magic, flags, method, stored_size, size, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
    if (
        magic != MAGIC
        or header[_LOCAL_HEADER.size :] != raw_name
        or name_length != len(raw_name)
        or method
        or flags & ~_KNOWN_FLAGS
        or stored_size not in (0, _IN_EXTRA, entry.size)
        or size not in (0, _IN_EXTRA, entry.size)
        or extra_start + extra_length + entry.size > directory_start
    ):
        raise CorruptError(
            f"{file.where}: the local header of its record {entry.name} contradicts the zip directory. Fetch it again, "
            "and do not trust this file."
        )
    return ByteRange(extra_start + extra_length, entry.size)
