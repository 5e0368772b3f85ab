"""The safetensors format: reads the index of a file or a sharded folder without its weights, and makes headers.

The safetensors library returns tensors, not their offsets, so the header is read here: 8 bytes of little-endian
length, JSON, then the data (https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from streamconv.display import printable
from streamconv.errors import CorruptError, NotACheckpointError, SourceError, TruncatedError
from streamconv.files.base import ByteRange, File
from streamconv.files.local import MAX_JSON_BYTES
from streamconv.formats.limits import MAX_TENSORS, are_sizes, check_name, is_shape, read_json
from streamconv.tensors.expressions import Expression, Read, Record
from streamconv.tensors.info import DTYPES, TensorInfo, contiguous_strides

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_OTHER_LIBRARIES = {"tf": "TensorFlow", "flax": "Flax"}  # as transformers writes them in the metadata
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit, so that no file has a longer one


def is_header(start: bytes) -> bool:
    """Return whether a file with these first bytes can be one: eight bytes of length, then JSON."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER_BYTES


def read_index(file: File) -> tuple[dict[str, Read], str]:
    """Return the tensors of one file by name, and a fingerprint of its header and size.

    The format has no checksums, so files that differ in their weights alone have the same fingerprint.

    Raises:
        NotACheckpointError, TruncatedError, CorruptError, SourceError
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if 8 + length > file.size:
        raise TruncatedError(
            f"{file.where} ends within its header: the save, copy or download was cut short. Fetch it again."
        )
    if length > MAX_JSON_BYTES:
        raise SourceError(
            f"{file.where} has a header of {length:,} bytes, and streamconv reads up to {MAX_JSON_BYTES:,}: "
            f"{MAX_TENSORS:,} tensors need no more. Do not trust this file."
        )
    raw = file.read(8, length)
    fingerprint = sha256(raw + file.size.to_bytes(8, "little")).hexdigest()
    header = read_json(raw, f"{file.where}: its header")
    del raw
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise CorruptError(f"{file.where} has a __metadata__ that does not map strings to strings.")
    if metadata.get("format") in _OTHER_LIBRARIES:
        library = _OTHER_LIBRARIES[metadata["format"]]
        raise NotACheckpointError(
            f"{file.where} was saved for {library}, with its names and layouts. Use the model's file for PyTorch."
        )
    if len(header) > MAX_TENSORS:
        raise SourceError(f"{file.where} has more than {MAX_TENSORS:,} tensors. Do not trust this file.")
    tensors = {}
    for name in list(header):
        check_name(name, file.where)
        tensors[name] = _tensor(file, 8 + length, name, header.pop(name))
    _check_coverage(file, 8 + length, tensors)
    return tensors, fingerprint


def _tensor(file: File, data_start: int, name: str, entry: Any) -> Read:
    if type(entry) is not dict or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CorruptError(f"{file.where} has no dtype, shape or data_offsets for {printable(name)}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        what = printable(dtype) if type(dtype) is str else type(dtype).__name__
        raise SourceError(f"{file.where}: {printable(name)} has the dtype {what}, which streamconv does not read.")
    if type(shape) is not list or type(offsets) is not list or not is_shape(shape):
        raise CorruptError(f"{file.where}: {printable(name)} has an impossible shape or impossible data_offsets.")
    info = TensorInfo(DTYPES[dtype].code, tuple(shape))
    if len(offsets) != 2 or not are_sizes(offsets) or offsets[1] - offsets[0] != info.nbytes:
        raise CorruptError(
            f"{file.where}: {printable(name)}, {info}, does not fill the range that its data_offsets give."
        )
    record = Record(file.ref, name, ByteRange(data_start + offsets[0], info.nbytes))
    return Read(info, record, 0, contiguous_strides(info.shape))


def _check_coverage(file: File, data_start: int, tensors: dict[str, Read]) -> None:
    """Require, as the library does, that every byte after the header belongs to exactly one tensor."""
    at = data_start
    for record in sorted(
        (tensor.record for tensor in tensors.values()), key=lambda each: (each.range.start, each.range.end)
    ):
        if record.range.start != at:
            what = (
                "overlaps another tensor" if record.range.start < at else "has bytes before it that belong to no tensor"
            )
            raise CorruptError(f"{file.where}: {printable(record.name)} {what}. Do not trust this file.")
        at = record.range.end
        if at > file.size:
            raise TruncatedError(
                f"{file.where} ends within {printable(record.name)}: "
                "the save, copy or download was cut short. Fetch it again."
            )
    if at != file.size:
        raise CorruptError(f"{file.where} has {file.size - at:,} bytes at its end that belong to no tensor.")


# Files next to a model that transformers would load instead of it, or into it.
CONFLICTING_PATTERNS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.index.json"),
    *("adapter_config.json", "processor_config.json"),
)


def make_index(targets: Mapping[str, Expression], filenames: Mapping[str, str]) -> dict[str, Any]:
    """Return the contents of model.safetensors.index.json. ``filenames`` maps tensor names to files."""
    sizes = {
        "total_parameters": sum(tensor.info.nbytes // tensor.info.itemsize for tensor in targets.values()),
        "total_size": sum(tensor.info.nbytes for tensor in targets.values()),
    }
    return {"metadata": sizes, "weight_map": dict(filenames)}


def make_header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, list[str]]:
    """Return the header that safetensors.torch.save_file(…, metadata={"format": "pt"}) writes, and the tensors' order.

    They are ordered by dtype, then by name.
    """
    rank = {dtype: i for i, dtype in enumerate(DTYPES)}
    ordered = sorted(infos.items(), key=lambda item: (-rank[item[1].dtype], item[0].encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, info in ordered:
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [name for name, _ in ordered]
