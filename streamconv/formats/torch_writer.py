"""Lays out a .pth as torch.save does, without torch, so that it can be written from its first byte to its last.

A record's CRC-32 follows its bytes, and so does the zip's directory. The layout is that of torch's own writer (miniz in
caffe2/serialize/inline_container.cc), with the same choice of 32-bit and 64-bit fields; the zip format is described in
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.6 to 4.3.16 and 4.5.3. The pickle is spelled
out here because its names are torch's, and pickling a name imports its module.
"""

import pickle
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from streamconv.formats.segments import LateBytes, Segment
from streamconv.tensors.info import DTYPES, TensorInfo, contiguous_strides

_EMPTY_DICT = b"ccollections\nOrderedDict\n)R"
_ALIGNMENT = 64  # torch maps records into memory and aligns them
_MAX32, _MAX16 = 0xFFFFFFFF, 0xFFFF  # a field has this value if the number is in a 64-bit field elsewhere
_IN_UTF8, _CRC_FOLLOWS = 1 << 11, 1 << 3  # flags


def pth_segments(prefix: str, tensors: Mapping[str, TensorInfo]) -> list[Segment]:
    """Lay out a state dict of contiguous tensors, each with a storage of its own.

    ``prefix`` is the folder inside the zip, for torch the file's stem. No date is written: the same arguments give the
    same segments.
    """
    zip_file = _Zip()
    zip_file.add(f"{prefix}/data.pkl", _pickled(tensors))
    zip_file.add(f"{prefix}/byteorder", b"little")
    for key, (name, info) in enumerate(tensors.items()):
        zip_file.add(f"{prefix}/data/{key}", name, info.nbytes)
    zip_file.add(f"{prefix}/version", b"3\n")
    return zip_file.finish()


def write_pth(
    file: BinaryIO, prefix: str, tensors: Mapping[str, TensorInfo], data: Callable[[str], Iterable[bytes | memoryview]]
) -> None:
    """Write a .pth whose values are generated meanwhile: ``data`` yields the bytes of a tensor in pieces."""
    crcs: dict[str, int] = {}
    for segment in pth_segments(prefix, tensors):
        if isinstance(segment, str):
            for piece in data(segment):
                file.write(piece)
                crcs[segment] = zlib.crc32(piece, crcs.get(segment, 0))
        else:
            file.write(segment if isinstance(segment, bytes) else segment.make(crcs))


@dataclass(frozen=True, slots=True)
class _Record:
    """A record of the zip. ``crc`` is its CRC-32, or the name of the tensor that it holds."""

    name: bytes
    size: int
    offset: int
    crc: int | str

    @property
    def flags(self) -> int:
        return _IN_UTF8 | (_CRC_FOLLOWS if self.size else 0)  # nothing follows an empty record

    @property
    def large(self) -> bytes:
        """The extra field for numbers that do not fit into 32 bits."""
        numbers = [self.size] * 2 * (self.size >= _MAX32) + [self.offset] * (self.offset >= _MAX32)
        return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""

    def local_header(self) -> bytes:
        """The bytes before the record's own, padded so that these are aligned."""
        start = self.offset + 30 + len(self.name) + len(self.large) + 4
        padding = -start % _ALIGNMENT
        extra = self.large + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fixed = struct.pack("<4s5H3L2H", b"PK\3\4", 0, self.flags, 0, 0, 0, 0, 0, 0, len(self.name), len(extra))
        return fixed + self.name + extra

    @property
    def descriptor_size(self) -> int:
        return 0 if not self.size else 24 if self.large else 16

    def descriptor(self, crcs: Mapping[str, int]) -> bytes:
        """The bytes after the record's own."""
        return struct.pack("<4sL2Q" if self.large else "<4s3L", b"PK\7\10", self._crc(crcs), self.size, self.size)

    @property
    def entry_size(self) -> int:
        return 46 + len(self.name) + len(self.large)

    def entry(self, crcs: Mapping[str, int]) -> bytes:
        """The record's entry in the directory."""
        size, offset, lengths = min(self.size, _MAX32), min(self.offset, _MAX32), (len(self.name), len(self.large))
        numbers = (self._crc(crcs), size, size, *lengths, 0, 0, 0, 0, offset)
        return struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, self.flags, 0, 0, 0, *numbers) + self.name + self.large

    def _crc(self, crcs: Mapping[str, int]) -> int:
        return self.crc if isinstance(self.crc, int) else crcs.get(self.crc, 0)


class _Zip:
    """A zip file's segments, record by record."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._records: list[_Record] = []
        self._offset = 0

    def add(self, name: str, contents: bytes | str, size: int | None = None) -> None:
        """Add a record of bytes, or of a tensor's name and size in bytes."""
        size = len(contents) if size is None else size
        crc = zlib.crc32(contents) if isinstance(contents, bytes) else contents
        record = _Record(name.encode("utf-8", "replace"), size, self._offset, crc)
        header = record.local_header()
        self._segments += [header, contents]
        if record.descriptor_size:
            self._segments.append(LateBytes(record.descriptor_size, record.descriptor))
        self._records.append(record)
        self._offset += len(header) + size + record.descriptor_size

    def finish(self) -> list[Segment]:
        size = sum(record.entry_size for record in self._records)
        self._segments.append(LateBytes(size, partial(_directory, self._records)))
        count, end = len(self._records), self._offset + size
        self._segments.append(
            struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 798, 45, 0, 0, count, count, size, self._offset)
            + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
            + struct.pack(
                "<4s4H2LH", b"PK\5\6", 0, 0, *[min(count, _MAX16)] * 2, min(size, _MAX32), min(self._offset, _MAX32), 0
            )
        )
        return self._segments


def _directory(records: Sequence[_Record], crcs: Mapping[str, int]) -> bytes:
    return b"".join(record.entry(crcs) for record in records)


def _pickled(tensors: Mapping[str, TensorInfo]) -> bytes:
    """Pickle a state dict by protocol 2: an OrderedDict of torch._utils._rebuild_tensor_v2 calls."""
    items = b"".join(
        _literal(name)
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + b"(" + _literal("storage") + f"ctorch\n{DTYPES[info.dtype].storage}\n".encode()
        + _literal(str(key)) + _literal("cpu") + _literal(info.nbytes // info.itemsize) + b"tQ"
        + _literal(0) + _literal(info.shape) + _literal(contiguous_strides(info.shape)) + _literal(False)
        + _EMPTY_DICT + b"tR"
        for key, (name, info) in enumerate(tensors.items())
    )  # fmt: skip
    return b"\x80\x02" + _EMPTY_DICT + b"(" + items + b"u."


def _literal(value: object) -> bytes:
    """Return the opcodes that push a plain value: its pickle without the beginning and the end."""
    return pickle.dumps(value, protocol=2)[2:-1]
