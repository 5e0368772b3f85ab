"""Sources of a model's weights while it runs: mapped files, or a checkpoint that is read on demand."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from streamconv.files.reader import Reader
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.computed import Cast
from streamconv.tensors.evaluation import Evaluator
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import DTYPES
from streamconv.tensors.tiles import parts
from streamconv.verification.page_cache import FileMappings

READ_BYTES = 32 << 20  # read at once from a streamed source


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype for a safetensors code, such as "BF16"."""
    dtype: torch.dtype = getattr(torch, DTYPES[code].torch)
    return dtype


class Weights(Protocol):
    """A model's weights by their names in its state dict, on the CPU."""

    def read(self, name: str) -> Tensor:
        """Return a weight; it must not be changed."""

    def release(self, name: str) -> None:
        """Allow a weight's memory to be reused. The weight can be read again."""


class MappedWeights:
    """The tensors of a state dict, which are mapped from files."""

    def __init__(self, mapped: Mapping[str, Tensor]):
        self._mapped, self._files = mapped, FileMappings()

    def read(self, name: str) -> Tensor:
        tensor = self._mapped[name]
        self._files.will_need(tensor)
        return tensor

    def release(self, name: str) -> None:
        self._files.release(self._mapped[name])


class StreamedWeights:
    """A checkpoint's tensors, local or remote, which are read when they are used, and cast if the plan casts them.

    Models use their weights roughly in the order of ``tensors``, so each read also fetches the next ones and keeps them
    for a while. Records that are read completely are checked against their CRC-32.
    """

    def __init__(self, tensors: Mapping[str, Expression], reader: Reader):
        self._tensors, self._reader = tensors, reader
        self._order = list(tensors)
        self._recent: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        if name not in self._recent:
            self._read_from(self._order.index(name))
        return self._recent[name]

    def release(self, name: str) -> None:
        """Do nothing: the least recent weights are dropped when others are read."""

    def _read_from(self, first: int) -> None:
        names: list[str] = []
        size = 0
        for name in self._order[first:]:
            size += self._tensors[name].info.nbytes
            if names and (size > READ_BYTES or name in self._recent):
                break
            names.append(name)
        while self._recent and sum(tensor.nbytes for tensor in self._recent.values()) > READ_BYTES:
            del self._recent[next(iter(self._recent))]
        with Evaluator(self._reader, RecordChecks(self._reader)) as evaluator:
            evaluator.prefetch([self._tensors[name] for name in names])
            for name in names:
                self._recent[name] = _read_tensor(name, self._tensors[name], evaluator)


def _read_tensor(name: str, tensor: Expression, evaluator: Evaluator) -> Tensor:
    stored = tensor.of if isinstance(tensor, Cast) else tensor  # torch casts, not our own code
    data = torch.empty(stored.info.nbytes, dtype=torch.uint8)
    view, at = data.numpy().data, 0
    for part in parts(stored):
        size = part.values.info.nbytes
        evaluator.evaluate(name, part, view[at : at + size])
        at += size
    values = data.view(torch_dtype(stored.info.dtype)).reshape(stored.info.shape)
    return values.to(torch_dtype(tensor.info.dtype))
