"""Writes a .pth as torch.save writes it, one tensor at a time, without torch.

The zip is the standard library's; the pickle is spelled out here because its names are torch's,
and pickling a name imports its module. See `checkpoint.torch_zip` for the format.
"""

import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO

from streamconv.tensors.info import DTYPES, TensorInfo, contiguous_strides

_EMPTY_DICT = b"ccollections\nOrderedDict\n)R"
_ALIGNMENT = 64  # torch maps records into memory, and wants them aligned


def write_pth(
    file: BinaryIO, prefix: str, tensors: Mapping[str, TensorInfo], data: Callable[[str], Iterable[bytes | memoryview]]
) -> None:
    """Write a state dict of contiguous tensors, each with a storage of its own.

    ``prefix`` is the folder inside the zip, for torch the file's stem. ``data`` gives a tensor's
    row-major bytes in pieces, each used before the next one is asked for. ``file`` must be seekable.
    The same arguments give the same bytes: no date is written.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, f"{prefix}/data.pkl", [_pickled(tensors)])
        _write_record(archive, f"{prefix}/byteorder", [b"little"])
        for key, name in enumerate(tensors):
            _write_record(archive, f"{prefix}/data/{key}", data(name), tensors[name].nbytes)
        _write_record(archive, f"{prefix}/version", [b"3\n"])


def _write_record(archive: zipfile.ZipFile, name: str, pieces: Iterable[bytes | memoryview], size: int = 0) -> None:
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.file_size = size  # from which zipfile knows whether the local header needs 64-bit sizes
    is_large = size * 1.05 > zipfile.ZIP64_LIMIT
    behind = archive.start_dir + 30 + len(name.encode()) + (20 if is_large else 0) + 4
    padding = -behind % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # torch pads in the same field
    with archive.open(entry, "w") as record:
        for piece in pieces:
            record.write(piece)


def _pickled(tensors: Mapping[str, TensorInfo]) -> bytes:
    """Protocol 2: an OrderedDict of torch._utils._rebuild_tensor_v2 calls, as a state dict is saved."""
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
    """The opcodes that push a plain value: a pickle of it, without its head and its end."""
    return pickle.dumps(value, protocol=2)[2:-1]
