"""Operations of rules: the steps from the sources of a rule to its targets, and back.

An operation takes a list of tensors and returns another list. It only makes views and expressions; nothing is read.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from streamconv.tensors.computed import multiply
from streamconv.tensors.concatenation import concat, reshape, stack
from streamconv.tensors.constants import filled
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import TensorInfo
from streamconv.tensors.shapes import MAX_PARTS, TooManyPartsError

Symbols = tuple[str, ...]
Dims = Mapping[str, int]


class NoInverseError(ValueError):
    """The results of an operation do not determine its inputs. The message states why."""


def resolve_shape(symbols: Symbols, dims: Dims) -> tuple[int, ...]:
    """Return the shape that symbols describe; some are numbers already.

    Raises:
        KeyError: a symbol has no number.
    """
    return tuple(int(symbol) if symbol.isdigit() else dims[symbol] for symbol in symbols)


class Operation(ABC):
    """A step from the sources of a rule to its targets.

    Both methods raise ValueError for tensors that do not fit. ``rounds``: the results are computed, and rounded to the
    dtype of the sources. A cast then comes before the operation, so that the result is that of a cast original.
    """

    __slots__ = ()
    rounds: ClassVar[bool] = False

    @abstractmethod
    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        """Return the results. ``dims`` are the numbers of the family's symbols."""

    @abstractmethod
    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        """Return the inputs of the results ``tensors``. ``inputs`` are their dtypes and shapes, None if not known.

        Raises:
            NoInverseError: the operation has no inverse, or none without ``inputs``.
        """


@dataclass(frozen=True, slots=True)
class Chunk(Operation):
    """Cuts each tensor into equal parts along ``dim``, like torch.chunk."""

    count: int
    dim: int = 0

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        return [part for tensor in tensors for part in tensor.chunk(self.count, self.dim)]

    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        return [concat(each, self.dim) for each in _runs_of_equals(tensors, self.count)]


@dataclass(frozen=True, slots=True)
class Concat(Operation):
    """Concatenates all tensors along ``dim``, like torch.cat."""

    dim: int = 0

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        return [concat(tensors, self.dim)]

    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        if inputs is None:
            raise NoInverseError("the sizes of the parts are not known")
        (tensor,) = tensors
        return tensor.split([_size(info, self.dim) for info in inputs], self.dim)


@dataclass(frozen=True, slots=True)
class Stack(Operation):
    """Concatenates tensors along a new dimension, like torch.stack: all of them, or ``groups`` runs of equal length."""

    dim: int = 0
    groups: int = 1

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        return [stack(each, self.dim) for each in _runs_of_equals(tensors, len(tensors) // self.groups)]

    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        counts = [_size(tensor.info, self.dim) for tensor in tensors]
        if sum(counts) > MAX_PARTS:  # a hostile file may claim any size
            raise TooManyPartsError(f"{tensors[0].info} is a stack of too many tensors")
        pairs = zip(tensors, counts, strict=True)
        parts = (part for tensor, count in pairs for part in tensor.split([1] * count, self.dim))
        return [reshape(part, (*part.shape[: self.dim], *part.shape[self.dim + 1 :])) for part in parts]


@dataclass(frozen=True, slots=True)
class Permute(Operation):
    """Puts the dimensions of each tensor in another order, like torch.permute."""

    dims: tuple[int, ...]

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        return [self._permuted(tensor, self.dims) for tensor in tensors]

    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        inverse = [self.dims.index(dim) for dim in range(len(self.dims))]
        return [self._permuted(tensor, inverse) for tensor in tensors]

    def _permuted(self, tensor: Expression, dims: Sequence[int]) -> Expression:
        if len(tensor.shape) != len(dims):
            raise ValueError(f"{tensor.info} does not have {len(dims)} dimensions")
        return tensor.permute(dims)


@dataclass(frozen=True, slots=True)
class Transpose(Operation):
    """Swaps two dimensions of each tensor, like torch.transpose."""

    one: int = 0
    other: int = 1

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        return [tensor.transpose(self.one, self.other) for tensor in tensors]

    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        return self.apply(tensors, {})


@dataclass(frozen=True, slots=True)
class Reshape(Operation):
    """Gives each tensor another shape, like torch.reshape. ``shape`` is symbols: ``("1", "1", "D")``."""

    shape: Symbols

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        return [reshape(tensor, resolve_shape(self.shape, dims)) for tensor in tensors]

    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        if inputs is None:
            raise NoInverseError("the shape before reshaping is not known")
        return [reshape(tensor, info.shape) for tensor, info in zip(tensors, inputs, strict=True)]


@dataclass(frozen=True, slots=True)
class Multiply(Operation):
    """Multiplies two tensors of one shape, element by element."""

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        one, other = tensors
        return [multiply(one, other)]

    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        raise NoInverseError("the factors of a product cannot be recovered")


@dataclass(frozen=True, slots=True)
class Prepend(Operation):
    """Puts ``rows`` entries with a constant value before each tensor along ``dim``."""

    value: float
    rows: int = 1
    dim: int = 0

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        results = []
        for tensor in tensors:
            shape = (*tensor.shape[: self.dim], self.rows, *tensor.shape[self.dim + 1 :])
            results.append(concat([filled(self.value, TensorInfo(tensor.info.dtype, shape)), tensor], self.dim))
        return results

    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        sizes = ([self.rows, _size(tensor.info, self.dim) - self.rows] for tensor in tensors)
        return [tensor.split(each, self.dim)[1] for tensor, each in zip(tensors, sizes, strict=True)]


@dataclass(frozen=True, slots=True)
class Omit(Operation):
    """Leaves out the tensor ``index`` of the list. Undoing it puts a tensor of one ``value`` there."""

    index: int
    reason: str
    value: float = 0.0

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        return [*tensors[: self.index], *tensors[self.index + 1 :]]

    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        if inputs is not None and len(inputs) != len(tensors) + 1:
            raise ValueError(f"{len(tensors)} tensors are not {len(inputs)} without one")
        info = tensors[0].info if inputs is None else TensorInfo(tensors[0].info.dtype, inputs[self.index].shape)
        return [*tensors[: self.index], filled(self.value, info), *tensors[self.index :]]


def _size(info: TensorInfo, dim: int) -> int:
    """Return the size of a dimension.

    Raises:
        ValueError: the tensor does not have it.
    """
    if dim >= len(info.shape):
        raise ValueError(f"{info} has no dim {dim}")
    return info.shape[dim]


def _runs_of_equals(tensors: Sequence[Expression], length: int) -> list[Sequence[Expression]]:
    """Divide tensors into runs of ``length``.

    Raises:
        ValueError: a run is incomplete, or its tensors differ in dtype or shape.
    """
    runs = [tensors[at : at + length] for at in range(0, len(tensors), length)]
    for run in runs:
        if len(run) != length or {tensor.info for tensor in run} != {run[0].info}:
            raise ValueError("tensors that belong together differ in dtype or shape")
    return runs
