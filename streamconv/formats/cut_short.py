"""Finds the size of a .pth before it was cut short: torch.save writes the index first, which lists every storage."""

import struct

from streamconv.errors import SourceError
from streamconv.files.base import ByteRange, File
from streamconv.formats.torch_pickle import Index
from streamconv.formats.unpickle import MAX_PICKLE_BYTES, Pickles
from streamconv.formats.unread import PickleError
from streamconv.tensors.expressions import Record
from streamconv.tensors.info import DTYPES

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # only the lengths of the name and of the extra field
_PIECE_BYTES = 512 << 10


def least_size(file: File) -> int:
    """Return how many bytes the index and the weights take; 0 if the file does not begin with a whole index."""
    sizes: dict[str, int] = {}

    def record_of(key: str, dtype: str, numel: int) -> Record:
        sizes[key] = numel * DTYPES[dtype].itemsize
        return Record(file.ref, key, ByteRange(0, sizes[key]))

    try:
        _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(0, _LOCAL_HEADER.size))
        if not file.read(_LOCAL_HEADER.size, name_length).endswith(b"/data.pkl"):
            return 0
        start: int = _LOCAL_HEADER.size + name_length + extra_length
        at = start

        def more(count: int) -> bytes:
            nonlocal at
            end = min(file.size, start + MAX_PICKLE_BYTES)
            data = file.read(at, max(0, min(max(count, _PIECE_BYTES), end - at)))
            at += len(data)
            return data

        index = Index(file.where, record_of)
        Pickles(b"", more, None).load(index.find_global, index.storage)
    except (PickleError, SourceError, TypeError, struct.error):
        return 0
    return start + sum(sizes.values())
