"""The index of safetensors files, single or sharded, without reading a weight.

The safetensors library hands out tensors, not where they lie, so the header is read here:
8 bytes of little-endian length, JSON, then the data
(https://github.com/huggingface/safetensors#format).
"""

import json
import os
from hashlib import sha256
from pathlib import Path

from streamconv.checkpoint.storage import LocalFile
from streamconv.errors import CorruptError, NotACheckpointError, SourceError, SourceMissingError, TruncatedError
from streamconv.tensors import DTYPE_SIZES, ByteRange, Record, SourceTensor, TensorInfo, contiguous_strides

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the library's own limit


def read_index(file: LocalFile) -> tuple[dict[str, SourceTensor], str]:
    """The tensors of one file by name, and a fingerprint of its header and size.

    The format carries no checksums, so the fingerprint cannot tell two files apart that differ
    in their weights alone.

    Raises:
        NotACheckpointError, TruncatedError, CorruptError
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise NotACheckpointError(f"{file.path} is neither a checkpoint of torch.save nor a safetensors file.")
    if 8 + length > file.size:
        raise TruncatedError(f"{file.path} ends within its header: the download was cut short. Fetch it again.")
    raw = file.read(8, length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(file, 8 + length, name, entry) for name, entry in header.items()}
    except SourceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{file.path} has a damaged safetensors header: {error}.") from error
    return entries, sha256(raw + file.size.to_bytes(8, "little")).hexdigest()


def _entry(file: LocalFile, data_start: int, name: str, entry: dict[str, object]) -> SourceTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_SIZES:
        raise SourceError(f"{file.path}: {name} has the dtype {dtype}, which streamconv does not read.")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError(f"shape {shape!r} and offsets {offsets!r} of {name}")
    start, end = offsets
    info = TensorInfo(dtype, tuple(shape))
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or end - start != info.nbytes:
        raise CorruptError(f"{file.path}: {name}, {info}, does not fill the range {start} to {end} that it names.")
    if data_start + end > file.size:
        raise TruncatedError(f"{file.path} ends within {name}: the download was cut short. Fetch it again.")
    record = Record(file, name, ByteRange(data_start + start, info.nbytes))
    return SourceTensor(info, record, 0, contiguous_strides(info.shape))


def files_of(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder: the single one, else those of the index.

    Raises:
        SourceError: there is neither, or the index names a file outside the folder.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if os.path.exists(single):
        return [single]
    if not os.path.exists(index):
        raise SourceMissingError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}.")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{index} is damaged: {error}.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptError(f"{index} names {name!r}, which is no file of its folder.")
    return [folder / name for name in names]
