"""The arrays of an .npz file, mapped with numpy's own reader of headers, as torch tensors.

numpy.load would read whole arrays into memory: it maps .npy files only.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile

import numpy as np
import torch

_LOCAL_HEADER_BYTES = 30  # before the name and the extra field, whose lengths are its last four bytes


class NumpyFile(Mapping[str, torch.Tensor]):
    """The tensors of an .npz file by name. Each is mapped when it is first asked for."""

    def __init__(self, path: Path):
        self._path = path
        with ZipFile(path) as archive:
            self._offsets = {info.filename.removesuffix(".npy"): info.header_offset for info in archive.infolist()}

    def __getitem__(self, name: str) -> torch.Tensor:
        with open(self._path, "rb") as file:
            file.seek(self._offsets[name] + _LOCAL_HEADER_BYTES - 4)
            lengths = file.read(4)
            file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR)
            read_header: Any = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[np.lib.format.read_magic(file)]
            shape, is_fortran, dtype = read_header(file)
            offset = file.tell()
        order: Literal["F", "C"] = "F" if is_fortran else "C"
        if not np.prod(shape, dtype=np.int64):
            return torch.from_numpy(np.empty(shape, dtype, order))  # nothing can be mapped
        # Privately, as torch maps files: nothing is written to the file.
        return torch.from_numpy(np.memmap(self._path, dtype, "c", offset, shape, order))

    def __iter__(self) -> Iterator[str]:
        return iter(self._offsets)

    def __len__(self) -> int:
        return len(self._offsets)
