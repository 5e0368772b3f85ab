"""The index of a .pth: names, dtypes, shapes and where the bytes lie, without reading a weight.

The container (torch >= 1.6) is a zip of stored records: ``<prefix>/data.pkl`` describes the
tensors, ``<prefix>/data/<key>`` holds a storage's bytes. torch's own reader needs 600 MB to import
and checks no checksum. The format is documented in
https://docs.pytorch.org/docs/stable/notes/serialization.html and in torch/serialization.py.

The pickle is never trusted: `unpickle` carries it out, `_Index.find` answers for a fixed list of names
with functions that build descriptions, and refuses every other name. No code of a checkpoint runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from streamconv.checkpoint.limits import MAX_TENSORS, are_sizes, check_name, is_shape, shown
from streamconv.checkpoint.storage import File
from streamconv.checkpoint.unpickle import MAX_PICKLE_BYTES, PickleError, load
from streamconv.checkpoint.zip_index import read_record, read_records
from streamconv.errors import CorruptError, NotACheckpointError, SourceError, UnsafePickleError
from streamconv.tensors import DTYPE_SIZES, Record, SourceTensor, TensorInfo

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


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    record: Record


class _Index:
    """What the names and persistent ids of ``data.pkl`` stand for."""

    def __init__(self, records: Mapping[str, Record], prefix: str, where: str):
        self._records, self._prefix, self._where = records, prefix, where
        self._dtypes: dict[str, str] = {}  # of the records that are named as storages
        self._count = 0
        self._functions: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): lambda: {},
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
        }

    def find(self, module: str, name: str) -> Any:
        function = self._functions.get((module, name))
        if function is not None:
            return function
        if module == "torch" and (name in _STORAGE_DTYPES or name in _V3_DTYPES):
            return _Name(name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Name(name)
        raise UnsafePickleError(
            f"{self._where} names {shown(f'{module}.{name}')}, which is no tensor. Nothing of it was run. A checkpoint "
            "of plain tensors needs no such name: save model.state_dict() alone, or do not trust this file."
        )

    def storage(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise PickleError("it has a persistent id that is no storage's")
        _, kind, key, _, numel = pid
        if type(kind) is not _Name or kind in _V3_DTYPES or type(key) is not str or not are_sizes([numel]):
            raise PickleError("it names a storage without a type, a key or a size")
        dtype = _STORAGE_DTYPES.get(kind, "U8")  # an UntypedStorage counts bytes
        record = self._records.get(f"{self._prefix}data/{key}")
        if record is None:
            raise CorruptError(f"{self._where} has no record data/{shown(key)}, which its index names.")
        if record.range.length != numel * DTYPE_SIZES[dtype]:
            raise CorruptError(
                f"{self._where}: its record {record.name} has {record.range.length} bytes where its index says "
                f"{numel} elements of {dtype}."
            )
        # torch.save refuses this where there are bytes; some releases of torch.load read the first dtype twice.
        if numel and self._dtypes.setdefault(record.name, dtype) != dtype:
            raise CorruptError(f"{self._where} names its record {record.name} as {dtype} and as another dtype.")
        return _Storage(dtype, record)

    def _tensor_v2(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> SourceTensor:
        if type(storage) is not _Storage:
            raise PickleError("it has a tensor without a storage")
        return self._tensor(storage.dtype, storage, offset, shape, strides, metadata)

    def _tensor_v3(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any,
        metadata: Any = None,
    ) -> SourceTensor:  # fmt: skip
        if type(storage) is not _Storage or type(dtype) is not _Name or dtype not in _V3_DTYPES:
            raise PickleError("it has a tensor without a storage or a dtype")
        return self._tensor(_V3_DTYPES[dtype], storage, offset, shape, strides, metadata)

    def _tensor(
        self, dtype: str, storage: _Storage, offset: Any, shape: Any, strides: Any, metadata: Any
    ) -> SourceTensor:
        self._count += 1
        if self._count > MAX_TENSORS:
            raise PickleError(f"it describes more than {MAX_TENSORS:,} tensors")
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            raise PickleError("it has a tensor whose shape and strides do not fit together")
        if not is_shape(shape) or not are_sizes((offset, *strides)):
            raise PickleError("it has a tensor with an impossible offset, shape or strides")
        if metadata:  # {"conj": True} or {"neg": True}: the bytes are not the values
            raise SourceError(
                f"{self._where} holds a tensor whose values are a lazy view of its bytes, conjugated or negated. "
                "Save it again after tensor.resolve_conj().resolve_neg()."
            )
        tensor = SourceTensor(TensorInfo(dtype, shape), storage.record, offset * DTYPE_SIZES[dtype], strides)
        if 0 not in shape and tensor.offset + tensor.span > storage.record.range.length:
            raise PickleError(
                f"a tensor {tensor.info} at element {offset} reaches beyond its storage {storage.record.name} "
                f"of {storage.record.range.length} bytes"
            )
        return tensor


def read_index(file: File, is_exact: bool = True) -> tuple[dict[str, SourceTensor], str]:
    """The tensors of a .pth by name, and the file's fingerprint; ``is_exact`` as `zip_index.read_records` has it.

    Raises:
        TruncatedError, CorruptError, NotACheckpointError, UnsafePickleError, SourceError
    """
    records = read_records(file, is_exact)
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1 or any("/code/" in name for name in records):
        raise NotACheckpointError(
            f"{file.where} is a zip, but not of torch.save (it has {len(pickles)} data.pkl records). "
            "A TorchScript archive is a program: save its state_dict() instead."
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if next(iter(records)).partition("/")[0] + "/" != prefix:  # where torch looks for it
        raise CorruptError(f"{file.where}: its {pickles[0]} is not in the folder of its first record.")
    byteorders = [name for name in records if name.lower() == f"{prefix}byteorder".lower()]  # as torch finds it
    if byteorders and read_record(file, records[byteorders[0]], 16) != b"little":
        raise SourceError(f"{file.where} was saved on a big-endian machine. Load and save it on a little-endian one.")
    pickled = read_record(file, records[pickles[0]], MAX_PICKLE_BYTES)
    index = _Index(records, prefix, file.where)
    try:
        contents = load(pickled, index.find, index.storage)
    except (PickleError, TypeError) as error:  # TypeError: a function was given too few or too many values
        raise CorruptError(f"{file.where}: its data.pkl is damaged or not of torch.save: {error}.") from error
    return _flat(contents, file), _fingerprint(records, pickled)


def _fingerprint(records: Mapping[str, Record], pickled: bytes) -> str:
    """A sha256 of the pickle and of every record's name, size and CRC-32.

    With CRCs in the file, this stands for every byte of every weight, and no weight is read.
    """
    digest = sha256(pickled)
    for name, record in sorted(records.items()):
        digest.update(f"\0{name}\0{record.range.length}\0{record.crc32 or 0}".encode())
    return digest.hexdigest()


def _flat(contents: Any, file: File) -> dict[str, SourceTensor]:
    if type(contents) is not dict:
        raise NotACheckpointError(f"{file.where} holds a {_kind(contents)}, not a dict of tensors.")
    others = [(key, value) for key, value in contents.items() if type(value) is not SourceTensor]
    if others:
        some = ", ".join(f"'{shown(str(key))}': {_kind(value)}" for key, value in others[:5])
        raise NotACheckpointError(
            f"{file.where} holds more than tensors ({some}{', …' if len(others) > 5 else ''}). "
            "Save the model's flat state dict alone."
        )
    if len(contents) > MAX_TENSORS:
        raise SourceError(f"{file.where} has more than {MAX_TENSORS:,} tensors. Do not trust this file.")
    for name in contents:
        check_name(name, file.where)
    return contents


def _kind(value: Any) -> str:
    if type(value) is SourceTensor:
        return "tensor"
    return f"dict of {len(value)}" if type(value) is dict else type(value).__name__
