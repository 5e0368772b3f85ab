"""The index of a .pth from before torch 1.6, or saved with ``_use_new_zipfile_serialization=False``.

Such a file is not a zip but five pickles, then the storages. The pickles are a magic number, the protocol's version,
properties of the system, the tensors (`torch_pickle`), and the keys of the storages in file order. A storage is its
number of elements in 8 bytes, then its bytes. The only documentation is `_legacy_save` and `_legacy_load` in
torch/serialization.py.

The length of a pickle is not stored, so it has to be executed to find its end, and nothing has a checksum.
"""

import re
from dataclasses import replace
from hashlib import sha256
from typing import Any, NoReturn

from streamconv.display import printable
from streamconv.errors import CorruptError, NotACheckpointError, SourceError, TruncatedError
from streamconv.files.base import ByteRange, File
from streamconv.formats.limits import MAX_TENSORS
from streamconv.formats.non_tensors import NonTensor
from streamconv.formats.pickled_tensors import find_tensors
from streamconv.formats.torch_pickle import Index
from streamconv.formats.unpickle import MAX_PICKLE_BYTES, Pickles
from streamconv.formats.unread import PickleError, Unread
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import DTYPES

HEAD_BYTES = 24
_MAGIC = 0x1950A86A20F9469CFC6C
_HEAD = re.compile(rb"\x80[\x02-\x05](?:\x95.{8})?\x8a\x0a" + re.escape(_MAGIC.to_bytes(10, "little")), re.DOTALL)
_VERSION = 1001
_PIECE_BYTES = 64 << 10
_COUNT_BYTES = 8
_MAX_SYSTEM_OPCODES = 1_000  # torch writes 27
_MAX_KEY_OPCODES = 3 * MAX_TENSORS  # and two per key
_MAX_KEY_LENGTH = 20  # the decimal digits of a 64-bit address


def is_legacy(start: bytes) -> bool:
    """Return whether a file is in this format, from its first `HEAD_BYTES` bytes."""
    return _HEAD.match(start) is not None


def read_index(file: File, read_local_headers: bool = True) -> tuple[dict[str, Read], dict[str, NonTensor], str]:
    """Return the tensors, other objects, both by name, and a fingerprint of the pickles and the size.

    The offsets of the weights follow from the pickles. The number of elements before each storage is redundant; it is
    read and compared, as torch does, unless ``read_local_headers`` is False.

    Raises:
        TruncatedError, CorruptError, NotACheckpointError, UnsafePickleError, SourceError
    """
    pieces = _PieceReader(file)
    pickles = Pickles(pieces.read(HEAD_BYTES), pieces.read, record_count=None)
    storages = _Storages(file)
    index = Index(file.where, storages.record_of)
    try:
        if [pickles.load(_refuse_global, _refuse_storage, _MAX_SYSTEM_OPCODES) for _ in range(2)] != [_MAGIC, _VERSION]:
            raise NotACheckpointError(
                f"{file.where} begins like a .pth from before torch 1.6, but is not one. Fetch it again."
            )
        _check_system(pickles.load(_refuse_global, _refuse_storage, _MAX_SYSTEM_OPCODES), file.where)
        contents = pickles.load(
            index.find_global, lambda pid: _module_class(pid) or index.storage(storages.without_view(pid))
        )
        tensors, non_tensors = find_tensors(contents, file.where)
        keys = pickles.load(_refuse_global, _refuse_storage, _MAX_KEY_OPCODES)
    except (PickleError, TypeError) as error:  # TypeError: a function was given too few or too many values
        raise CorruptError(
            f"{file.where}: its index is cut short, damaged or not from torch.save: {error}. Fetch it again."
        ) from error
    end = pieces.position - len(pickles.rest)
    fingerprint = _fingerprint(file, end)
    records = storages.place(keys, end)
    if read_local_headers:
        storages.check_counts(records)
    for name, tensor in tensors.items():
        tensors[name] = Read(tensor.info, records[tensor.record.name], tensor.offset, tensor.strides)
    return tensors, non_tensors, fingerprint


class _PieceReader:
    """Reads a file from its beginning, piece by piece, up to the size that pickles may have."""

    def __init__(self, file: File):
        self._file, self.position = file, 0

    def read(self, count: int) -> bytes:
        """Read the next piece: at least ``count`` bytes, unless the file ends before."""
        if self.position >= MAX_PICKLE_BYTES:
            raise SourceError(
                f"{self._file.where} has an index of more than {MAX_PICKLE_BYTES:,} bytes: {MAX_TENSORS:,} tensors "
                "need no more. Do not trust this file."
            )
        start = self.position
        self.position = min(start + max(count, _PIECE_BYTES), self._file.size)
        return self._file.read(start, self.position - start)


class _Storages:
    """The storages that the tensors use. Their offsets are not known until the list of keys, which comes later."""

    def __init__(self, file: File):
        self._file = file
        self._counts: dict[str, int] = {}  # of elements, by key
        self._records: dict[str, Record] = {}  # by key; until `place`, each begins at 0

    def without_view(self, pid: Any) -> tuple[Any, ...]:
        """Return the persistent id as in a zip, without its last item: None, or for a view its place in a storage."""
        if type(pid) is not tuple or len(pid) != 6:
            raise PickleError("it has a persistent id that does not describe a storage")
        if pid[5] is not None:  # only old releases of torch write one
            raise SourceError(
                f"{self._file.where} holds a storage that is a view of another one, as the first releases of torch "
                "wrote them. Save it again: torch.save(torch.load(FILE, weights_only=True), FILE)."
            )
        if pid[1] == "UntypedStorage":
            raise SourceError(
                f"{self._file.where} holds tensors of a dtype that is newer than this format, such as float8; torch "
                "writes them but cannot load them. Save them again without _use_new_zipfile_serialization=False."
            )
        if type(pid[1]) is Unread:  # its size, and so the place of all storages after it, is not known
            raise SourceError(
                f"{self._file.where} holds tensors in a {printable(pid[1].name)}, of a dtype that streamconv does not "
                "read. Save it again without them, or without _use_new_zipfile_serialization=False."
            )
        return pid[:5]

    def record_of(self, key: str, dtype: str, numel: int) -> Record:
        """Return the record of a storage, whose offset is not known yet."""
        if not (key.isascii() and key.isdigit() and len(key) <= _MAX_KEY_LENGTH):
            raise PickleError("it names a storage by a key that is not a number")
        if key not in self._records:
            record = Record(self._file.ref, f"storage/{key}", ByteRange(0, numel * DTYPES[dtype].itemsize))
            self._counts[key], self._records[key] = numel, record
            if len(self._records) > MAX_TENSORS:
                raise PickleError(f"it names more than {MAX_TENSORS:,} storages")
        if self._counts[key] != numel:
            raise CorruptError(
                f"{self._file.where} gives its storage {key} both {self._counts[key]:,} and {numel:,} elements."
            )
        return self._records[key]

    def place(self, keys: Any, start: int) -> dict[str, Record]:
        """Return the records by name, one after another from the offset ``start``, in the order of ``keys``."""
        if (
            type(keys) is not list
            or not all(type(key) is str for key in keys)
            or len(keys) != len(self._records)
            or set(keys) != self._records.keys()
        ):
            raise CorruptError(
                f"{self._file.where}: its list of storages does not contain each of its tensors' storages once. "
                "Fetch it again, and do not trust this file."
            )
        records: dict[str, Record] = {}
        self._counts = {key: self._counts[key] for key in keys}
        for key in keys:
            record = self._records.pop(key)
            data_range = ByteRange(start + _COUNT_BYTES, record.range.length)
            records[record.name] = replace(record, range=data_range)
            start = data_range.end
        if start > self._file.size:
            raise TruncatedError(
                f"{self._file.where} ends within its weights: the save, copy or download was cut short. Fetch it again."
            )
        if start < self._file.size:
            raise CorruptError(
                f"{self._file.where} has {self._file.size - start:,} bytes at its end that belong to no storage."
            )
        return records

    def check_counts(self, records: dict[str, Record]) -> None:
        """Require that each storage begins with its number of elements.

        Like a zip's local headers, these are announced first, so that a file at an address takes few requests.
        """
        starts = [record.range.start - _COUNT_BYTES for record in records.values()]
        self._file.prefetch(ByteRange(start, _COUNT_BYTES) for start in starts)
        for start, (key, count) in zip(starts, self._counts.items(), strict=True):
            found = int.from_bytes(self._file.read(start, _COUNT_BYTES), "little")
            if found != count:
                raise CorruptError(
                    f"{self._file.where}: its storage {key} begins with a count of {found:,} elements, but the "
                    f"index has {count:,}. Fetch it again, and do not trust this file."
                )


def _check_system(properties: Any, where: str) -> None:
    is_little = properties.get("little_endian") if type(properties) is dict else None
    if is_little is False:
        raise SourceError(f"{where} was saved on a big-endian machine. Load and save it on a little-endian one.")
    if is_little is not True:
        raise CorruptError(f"{where} does not give its byte order. Fetch it again.")


def _fingerprint(file: File, end: int) -> str:
    # Read a second time rather than hashed on the way: the pickles' end is known only after reading past it.
    digest = sha256()
    for start in range(0, end, _PIECE_BYTES):
        digest.update(file.read(start, min(_PIECE_BYTES, end - start)))
    digest.update(file.size.to_bytes(8, "little"))
    return digest.hexdigest()


def _module_class(pid: Any) -> Unread | None:
    """Return the placeholder for the class of a saved module, whose source code in the pickle is ignored."""
    is_module = type(pid) is tuple and len(pid) == 4 and type(pid[0]) is str and pid[0] == "module"
    return pid[1] if is_module and type(pid[1]) is Unread else None


def _refuse_global(module: str, name: str) -> NoReturn:
    raise PickleError("it names a global, but only strings and numbers are allowed here")


def _refuse_storage(pid: Any) -> NoReturn:
    raise PickleError("it names a storage, but only strings and numbers are allowed here")
