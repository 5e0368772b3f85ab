"""The index of a .pth: names, dtypes, shapes and where the bytes lie, without reading a weight.

The container (torch >= 1.6) is a zip of stored records: ``<prefix>/data.pkl`` describes the
tensors, ``<prefix>/data/<key>`` holds a storage's bytes. torch's own reader needs 600 MB to import
and checks no checksum. The format is documented in
https://docs.pytorch.org/docs/stable/notes/serialization.html and in torch/serialization.py.

The pickle is never trusted: `_Index.find_class` answers for a fixed list of names with functions
that build descriptions, and refuses every other name. No code of a checkpoint runs.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from streamconv.checkpoint.storage import LocalFile
from streamconv.errors import CorruptError, NotACheckpointError, SourceError, TruncatedError, UnsafePickleError
from streamconv.tensors import DTYPE_SIZES, ByteRange, Record, SourceTensor, TensorInfo

MAGIC = b"PK\x03\x04"

# torch's storage classes and dtype names, to safetensors' codes.
_STORAGE_DTYPES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
_V3_DTYPES = {
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip


class _Name(str):
    """Stands for a torch class or dtype that a pickle names; it can be compared, not called."""

    __slots__ = ()


class _Handle(int):
    """Stands for a described tensor while the pickle is read: BUILD finds nothing in it to set."""

    __slots__ = ()


class _Index(pickle.Unpickler):
    """Turns ``data.pkl`` into descriptions, kept in ``tensors`` where the pickle cannot reach them."""

    def __init__(self, data: bytes, storage: Callable[[str, str, int], Record], where: str):
        super().__init__(io.BytesIO(data))
        self._storage, self._where = storage, where
        self.tensors: list[SourceTensor] = []
        self._functions: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
        }

    def find_class(self, module: str, name: str) -> Any:
        function = self._functions.get((module, name))
        if function is not None:
            return function
        if module == "torch" and (name in _STORAGE_DTYPES or name in _V3_DTYPES):
            return _Name(name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Name(name)
        raise UnsafePickleError(
            f"{self._where} names {module}.{name}, which is no tensor. Nothing of it was run. A checkpoint of "
            "plain tensors needs no such name: save model.state_dict() alone, or do not trust this file."
        )

    def persistent_load(self, pid: Any) -> tuple[str, Record]:
        kind, storage_type, key, _location, numel = pid
        if kind != "storage" or not isinstance(storage_type, _Name):
            raise ValueError(f"unknown persistent id {pid!r}")
        dtype = _STORAGE_DTYPES.get(storage_type, "U8")  # an UntypedStorage counts bytes
        return dtype, self._storage(key, dtype, numel)

    def _tensor_v2(
        self, storage: Any, offset: int, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> _Handle:
        dtype, record = storage
        return self._tensor(dtype, record, offset, shape, strides, metadata)

    def _tensor_v3(
        self, storage: Any, offset: int, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any,
        metadata: Any = None,
    ) -> _Handle:  # fmt: skip
        return self._tensor(_V3_DTYPES[dtype], storage[1], offset, shape, strides, metadata)

    def _tensor(self, dtype: str, record: Record, offset: Any, shape: Any, strides: Any, metadata: Any) -> _Handle:
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"offset {offset!r}, shape {shape!r} and strides {strides!r} describe no tensor")
        if metadata:  # {"conj": True} or {"neg": True}: the bytes are not the values
            raise SourceError(
                f"{self._where} holds a tensor whose values are a lazy view of its bytes ({', '.join(metadata)}). "
                "Save it again after tensor.resolve_conj().resolve_neg()."
            )
        tensor = SourceTensor(TensorInfo(dtype, tuple(shape)), record, offset * DTYPE_SIZES[dtype], tuple(strides))
        if tensor.info.nbytes and tensor.offset + tensor.span > record.range.length:
            raise ValueError(
                f"a tensor {tensor.info} at element {offset} reaches beyond its storage {record.name} "
                f"of {record.range.length} bytes"
            )
        self.tensors.append(tensor)
        return _Handle(len(self.tensors) - 1)


class _Records:
    """The zip's central directory, and where each record's bytes really start."""

    def __init__(self, file: LocalFile):
        self.file = file
        try:
            with open(file.path, "rb") as raw, zipfile.ZipFile(raw) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ArithmeticError, ValueError, struct.error) as error:
            if "not a zip file" in str(error):  # how zipfile says that there is no end record
                raise TruncatedError(
                    f"{file.path} begins as a zip but has no end: the download was cut short. Fetch it again."
                ) from error
            raise CorruptError(f"{file.path} has a damaged zip directory: {error}. Fetch it again.") from error
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) != len(entries):
            raise CorruptError(f"{file.path} has two records of one name.")
        # torch writes 0 everywhere where torch.serialization.set_crc32_options(False) was called.
        self.has_crcs = any(entry.CRC for entry in entries)

    def range_of(self, name: str) -> ByteRange:
        """Where the record's bytes lie: behind the local header, whose length is its own."""
        entry = self.entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise NotACheckpointError(
                f"{self.file.path}: its record {name} is compressed or encrypted, which torch never writes."
            )
        header = self.file.read(entry.header_offset, 30)
        if header[:4] != MAGIC:
            raise CorruptError(f"{self.file.path}: its record {name} has no header where the index says.")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > self.file.size:
            raise CorruptError(f"{self.file.path}: its record {name} reaches beyond the file's end.")
        return ByteRange(start, entry.file_size)

    def read(self, name: str) -> bytes:
        """A small record, whole and checked."""
        where = self.range_of(name)
        data = self.file.read(where.start, where.length)
        if self.has_crcs and zlib.crc32(data) != self.entries[name].CRC:
            raise CorruptError(
                f"{self.file.path}: its record {name} does not match its CRC-32: the file is damaged. Fetch it again."
            )
        return data

    def fingerprint(self, pickled: bytes) -> str:
        """A sha256 of the pickle and of every record's name, size and CRC-32.

        With CRCs in the file, this stands for every byte of every weight, and no weight is read.
        """
        digest = sha256(pickled)
        for name, entry in sorted(self.entries.items()):
            digest.update(f"\0{name}\0{entry.file_size}\0{entry.CRC}".encode())
        return digest.hexdigest()


def read_index(file: LocalFile) -> tuple[dict[str, SourceTensor], str]:
    """The tensors of a .pth by name, and the file's fingerprint.

    Raises:
        TruncatedError, CorruptError, NotACheckpointError, UnsafePickleError, SourceError
    """
    records = _Records(file)
    pickles = [name for name in records.entries if name.endswith("/data.pkl")]
    if len(pickles) != 1 or any("/code/" in name for name in records.entries):
        raise NotACheckpointError(
            f"{file.path} is a zip, but not of torch.save (it has {len(pickles)} data.pkl records). "
            "A TorchScript archive is a program: save its state_dict() instead."
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in records.entries and records.read(f"{prefix}byteorder") != b"little":
        raise SourceError(f"{file.path} was saved on a big-endian machine. Load and save it on a little-endian one.")

    opened: dict[tuple[str, str], Record] = {}

    def storage(key: str, dtype: str, numel: int) -> Record:
        if (key, dtype) not in opened:
            name = f"{prefix}data/{key}"
            if name not in records.entries:
                raise CorruptError(f"{file.path} has no record {name}, which its index names.")
            where = records.range_of(name)
            if where.length != numel * DTYPE_SIZES[dtype]:
                raise CorruptError(
                    f"{file.path}: its record {name} has {where.length} bytes where its index says "
                    f"{numel} elements of {dtype}."
                )
            crc = records.entries[name].CRC if records.has_crcs else None
            opened[key, dtype] = Record(file, name, where, crc)
        return opened[key, dtype]

    pickled = records.read(pickles[0])
    try:
        index = _Index(pickled, storage, str(file.path))
        contents = index.load()
    except SourceError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptError(f"{file.path}: its data.pkl is damaged or not of torch.save: {error}.") from error
    return _flat(contents, index.tensors, file), records.fingerprint(pickled)


def _flat(contents: Any, tensors: list[SourceTensor], file: LocalFile) -> dict[str, SourceTensor]:
    if not isinstance(contents, dict):
        raise NotACheckpointError(f"{file.path} holds a {_kind(contents)}, not a dict of tensors.")
    items = dict.items(contents)  # not contents.items: BUILD may have set that
    others = [f"{key!r}: {_kind(value)}" for key, value in items if not isinstance(value, _Handle)]
    if others:
        raise NotACheckpointError(
            f"{file.path} holds more than tensors ({', '.join(others[:5])}{', …' if len(others) > 5 else ''}). "
            "Save the model's flat state dict alone."
        )
    names = [key for key, _ in items if type(key) is not str]
    if names:
        raise NotACheckpointError(f"{file.path} names a tensor {names[0]!r}, which is no string.")
    return {key: tensors[value] for key, value in items}


def _kind(value: Any) -> str:
    if isinstance(value, _Handle):
        return "tensor"
    return f"dict of {len(value)}" if isinstance(value, dict) else type(value).__name__
