"""The index of an .npz file of numpy.savez: a zip with a stored record NAME.npy for each array.

A record is a header, which is text, then the array's bytes
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html). Only the headers are read, and no numpy is
needed. Arrays of Python objects are pickles, which are not read.

The zip's CRC-32 covers a record with its header. That of the array's bytes alone follows from it and from the header,
so each byte is still checked, and read once.
"""

import re
from collections.abc import Mapping
from hashlib import sha256
from zlib import crc32

from streamconv.display import printable
from streamconv.errors import CorruptError, NotACheckpointError, SourceError
from streamconv.files.base import ByteRange, File
from streamconv.formats.foreign.zips import NPY_SUFFIX
from streamconv.formats.limits import MAX_TENSORS, check_name, is_shape
from streamconv.formats.non_tensors import NonTensor
from streamconv.tensors.checksums import crc_of_rest
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import BY_NUMPY_NAME, TensorInfo, contiguous_strides

MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 1_000  # numpy writes 118 for up to 11 dimensions
_MIN_HEADER_BYTES = 128  # with the magic number and the length, as all current releases write it
# The header's dict, in any order. Old releases of numpy and Python 2 wrote other spaces, and sizes as 3L.
_SIZES = r"\([0-9L, ]*\)"
_ENTRY = rf"""['"](descr|fortran_order|shape)['"] *: *('[^']*'|"[^"]*"|\[.*\]|True|False|{_SIZES}) *"""
_HEADER = re.compile(rf"{{ *{', *'.join([_ENTRY] * 3)}(?:, *)?}}[ \n]*")
_SHAPE = re.compile(r"\((N, *(N, *)*(N *)?)?\)".replace("N", r"(0|[1-9]\d{0,18})L?"))
_UNNAMED = re.compile(r"arr_\d+")  # numpy's names for arrays that were given without one
_SIZE = re.compile(r"\d+")


def read_index(file: File, records: Mapping[str, Record]) -> tuple[dict[str, Read], dict[str, NonTensor], str]:
    """Return the tensors, the arrays that are not tensors, both by name, and the file's fingerprint.

    ``records`` are those of `read_records`.

    Raises:
        CorruptError, NotACheckpointError, SourceError
    """
    if len(records) > MAX_TENSORS:
        raise SourceError(f"{file.where} has more than {MAX_TENSORS:,} arrays. Do not trust this file.")
    file.prefetch(ByteRange(each.range.start, min(_MIN_HEADER_BYTES, each.range.length)) for each in records.values())
    tensors: dict[str, Read] = {}
    non_tensors: dict[str, NonTensor] = {}
    digest = sha256()
    for record_name, record in records.items():
        name = record_name.removesuffix(NPY_SUFFIX)
        check_name(name, file.where)
        header = _read_header(file, record)
        digest.update(f"{record_name}\0{record.range.length}\0{record.crc32 or 0}\0".encode() + header)
        dtype, is_fortran, shape = _parse(header, f"{file.where}: {printable(name)}")
        if dtype not in BY_NUMPY_NAME:
            non_tensors[name] = NonTensor(f"numpy array of {printable(dtype)}")
            continue
        info = TensorInfo(BY_NUMPY_NAME[dtype], shape)
        strides = contiguous_strides(shape[::-1])[::-1] if is_fortran else contiguous_strides(shape)
        tensors[name] = Read(info, _without_header(file, record, header, info), 0, strides)
    if not tensors:
        held = ", ".join(f"{printable(name)} is a {kind}" for name, kind in list(non_tensors.items())[:3])
        raise NotACheckpointError(
            f"{file.where} holds no arrays of numbers ({held}). Save a state dict with np.savez(FILE, **state_dict)."
        )
    if all(_UNNAMED.fullmatch(name) for name in tensors):
        raise NotACheckpointError(
            f"{file.where} holds arrays without names, such as {next(iter(tensors))}. Save a state dict with "
            "np.savez(FILE, **state_dict)."
        )
    return tensors, non_tensors, digest.hexdigest()


def _read_header(file: File, record: Record) -> bytes:
    """Return everything before the array's bytes: the magic number, the version, the length, and a dict as text."""
    start, length = record.range.start, record.range.length
    data = file.read(start, min(_MIN_HEADER_BYTES, length))
    size_bytes = 2 if data[6:7] == b"\1" else 4
    size = 8 + size_bytes + int.from_bytes(data[8 : 8 + size_bytes], "little")
    # Version 3 differs only in that names of structured dtypes, which no tensor has, may have any letters.
    if not data.startswith(MAGIC) or data[6:7] not in (b"\1", b"\2"):
        raise CorruptError(f"{file.where}: its record {record.name} is not a numpy array. Fetch it again.")
    if size > length:
        raise CorruptError(f"{file.where}: its record {record.name} ends within its header. Fetch it again.")
    if size > _MAX_HEADER_BYTES:
        # Only structured dtypes have long headers, and no tensor has one.
        raise SourceError(
            f"{file.where}: its record {record.name} has a header of {size:,} bytes, which no tensor needs. "
            "Save arrays of numbers only."
        )
    return data[:size] + (file.read(start + len(data), size - len(data)) if size > len(data) else b"")


def _parse(header: bytes, where: str) -> tuple[str, bool, tuple[int, ...]]:
    """Return the dtype as numpy spells it, whether the order is Fortran's, and the shape."""
    match = _HEADER.fullmatch(header[10 if header[6:7] == b"\1" else 12 :].decode("latin-1"))
    found = dict(zip(match.groups()[::2], match.groups()[1::2], strict=True)) if match else {}
    sizes = tuple(map(int, _SIZE.findall(found.get("shape", ""))))
    if len(found) != 3 or not _SHAPE.fullmatch(found["shape"]) or not is_shape(sizes):
        raise CorruptError(f"{where} has a damaged header. Fetch it again.")
    if found["fortran_order"] not in ("True", "False"):
        raise CorruptError(f"{where} has a damaged header. Fetch it again.")
    dtype = found["descr"].strip("'\"")
    if dtype[:1] == ">" and f"<{dtype[1:]}" in BY_NUMPY_NAME:
        raise SourceError(
            f"{where} is big-endian ({dtype}). Save it as little-endian: array.astype(array.dtype.newbyteorder('<'))."
        )
    return dtype, found["fortran_order"] == "True", sizes


def _without_header(file: File, record: Record, header: bytes, info: TensorInfo) -> Record:
    """Return the range of the array's bytes, with the CRC-32 that they have if the whole record matches its own."""
    length = record.range.length - len(header)
    if length != info.nbytes:
        raise CorruptError(
            f"{file.where}: its record {record.name} has {length:,} bytes after its header, but {info} has "
            f"{info.nbytes:,}. Fetch it again."
        )
    crc = None if record.crc32 is None else crc_of_rest(record.crc32, crc32(header), length)
    return Record(record.file, record.name, ByteRange(record.range.start + len(header), length), crc)
