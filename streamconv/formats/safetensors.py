"""The safetensors format: reads the index of a file or a sharded folder without its weights, and makes headers.

The safetensors library returns tensors, not their offsets, so the header is read here: 8 bytes of little-endian
length, JSON, then the data (https://github.com/huggingface/safetensors#format).
"""

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from streamconv.errors import (
    CorruptError,
    NotACheckpointError,
    SourceError,
    SourceMissingError,
    TruncatedError,
    printable,
)
from streamconv.files.address import Location
from streamconv.files.base import ByteRange, File
from streamconv.files.local import MAX_JSON_BYTES, read_small
from streamconv.formats.limits import MAX_TENSORS, are_sizes, check_name, is_shape, read_json
from streamconv.tensors.expressions import Record, SourceTensor
from streamconv.tensors.info import DTYPES, TensorInfo, contiguous_strides

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit, so that no file has a longer one


def read_index(file: File) -> tuple[dict[str, SourceTensor], str]:
    """Return the tensors of one file by name, and a fingerprint of its header and size.

    The format has no checksums, so files that differ in their weights alone have the same fingerprint.

    Raises:
        NotACheckpointError, TruncatedError, CorruptError, SourceError
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if length > _MAX_HEADER_BYTES:
        raise NotACheckpointError(f"{file.where} is neither a torch.save checkpoint nor a safetensors file.")
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
    if len(header) > MAX_TENSORS:
        raise SourceError(f"{file.where} has more than {MAX_TENSORS:,} tensors. Do not trust this file.")
    tensors = {}
    for name in list(header):
        check_name(name, file.where)
        tensors[name] = _tensor(file, 8 + length, name, header.pop(name))
    _check_coverage(file, 8 + length, tensors)
    return tensors, fingerprint


def _tensor(file: File, data_start: int, name: str, entry: Any) -> SourceTensor:
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
    return SourceTensor(info, record, 0, contiguous_strides(info.shape))


def _check_coverage(file: File, data_start: int, tensors: dict[str, SourceTensor]) -> None:
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


def list_files(folder: Path) -> Mapping[Location, set[str] | None]:
    """Return the safetensors files that transformers loads from a folder, each with the names of its tensors.

    If there is a single file, its names are None, since no index lists them.

    Raises:
        SourceError: there is neither a single file nor an index, the index is damaged, or a file is outside the folder.
    """
    index = folder / INDEX_NAME
    if os.path.exists(folder / SINGLE_NAME):
        return {_resolve(folder, SINGLE_NAME): None}
    if not os.path.exists(index):
        raise SourceMissingError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}.")
    weight_map = read_json(read_small(_resolve(folder, INDEX_NAME)), str(index)).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CorruptError(f"{index} has no weight_map, or an empty one.")
    files: dict[str, set[str]] = {}
    for name, filename in weight_map.items():
        if type(filename) is not str or not _is_safe_filename(filename):
            what = f"'{printable(filename)}'" if type(filename) is str else f"a {type(filename).__name__}"
            raise CorruptError(f"{index} names {what}, which is not a safetensors file in its folder.")
        files.setdefault(filename, set()).add(name)
    return {_resolve(folder, filename): files[filename] for filename in sorted(files)}


def check_weight_map(where: str, found: Iterable[str], listed: set[str]) -> None:
    """Require that a shard has the tensors that its index lists; otherwise, what loads depends on the loader's release.

    Raises:
        CorruptError: they differ.
    """
    different = listed.symmetric_difference(found)
    if different:
        name = min(different)
        what = "is only in the index" if name in listed else "is only in the file"
        raise CorruptError(
            f"{where} and {INDEX_NAME} disagree on {len(different):,} tensors: '{printable(name)}' {what}. "
            "They belong to different models: fetch both again."
        )


def _is_safe_filename(filename: str) -> bool:
    return (
        filename.endswith(".safetensors")
        and filename.isprintable()
        and len(filename) <= 255
        and not {"/", "\\", ":"} & set(filename)
    )


def _resolve(folder: Path, filename: str) -> Path:
    """Return the path of a file after checking that it is not a link to outside the folder.

    In huggingface_hub's cache, snapshots/<revision>/<file> may be a link to ../../blobs/<hash>.
    """
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / filename))
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if target.parent not in (root, *blobs):
        raise CorruptError(
            f"{folder / filename} is a link to {printable(str(target))}, outside its folder. Open that file itself, "
            "or put a copy into the folder."
        )
    return folder / filename


# Files next to a model that transformers would load instead of it, or into it.
CONFLICTING_PATTERNS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.index.json"),
    *("adapter_config.json", "processor_config.json"),
)


def make_index(targets: Mapping[str, SourceTensor], filenames: Mapping[str, str]) -> dict[str, Any]:
    """Return the contents of model.safetensors.index.json. ``filenames`` maps tensor names to files."""
    sizes = {
        "total_parameters": sum(tensor.info.nbytes // tensor.info.itemsize for tensor in targets.values()),
        "total_size": sum(tensor.target.nbytes for tensor in targets.values()),
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
