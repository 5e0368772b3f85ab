"""Expressions whose values are computed: casts, and the arithmetic of two tensors, element by element."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from streamconv.tensors.concatenation import reshape
from streamconv.tensors.expressions import Expression, Read
from streamconv.tensors.info import DtypeCode, TensorInfo
from streamconv.tensors.shapes import Shape

Operator = Literal["multiply", "add"]


@dataclass(frozen=True, slots=True)
class Cast(Expression):
    """A tensor whose values are converted to another dtype, like torch's ``.to()``; `cast` makes it."""

    info: TensorInfo
    of: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.of,)

    def with_operands(self, operands: Sequence[Expression]) -> "Cast":
        return Cast(self.info, *operands)

    @property
    def is_copied(self) -> bool:
        return False

    @property
    def fingerprint(self) -> str:
        # The dtype of the whole is known beside it, and so is that of a record's bytes.
        return self.of.fingerprint if isinstance(self.of, Read) else f"Cast:{self.operands_fingerprint}"

    def narrow(self, dim: int, start: int, length: int) -> "Cast":
        return _cast(self.of.narrow(dim, start, length), self.info.dtype)

    def permute(self, dims: Sequence[int]) -> "Cast":
        return _cast(self.of.permute(dims), self.info.dtype)

    def view(self, shape: Shape) -> "Cast":
        return _cast(reshape(self.of, shape), self.info.dtype)


@dataclass(frozen=True, slots=True)
class Elementwise(Expression):
    """Two tensors of one dtype and shape, combined element by element like torch's ``*`` or ``+``.

    `multiply` and `add` make it.
    """

    info: TensorInfo
    operator: Operator
    one: Expression
    other: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.one, self.other)

    def with_operands(self, operands: Sequence[Expression]) -> "Elementwise":
        return Elementwise(self.info, self.operator, *operands)

    @property
    def is_copied(self) -> bool:
        return False

    @property
    def fingerprint(self) -> str:
        return f"{self.operator}:{self.operands_fingerprint}"

    def narrow(self, dim: int, start: int, length: int) -> "Elementwise":
        return _elementwise(self.operator, self.one.narrow(dim, start, length), self.other.narrow(dim, start, length))

    def permute(self, dims: Sequence[int]) -> "Elementwise":
        return _elementwise(self.operator, self.one.permute(dims), self.other.permute(dims))

    def view(self, shape: Shape) -> "Elementwise":
        return _elementwise(self.operator, reshape(self.one, shape), reshape(self.other, shape))


def cast(tensor: Expression, dtype: DtypeCode) -> Expression:
    """Convert a tensor to a dtype; one that has it is returned as it is."""
    return tensor if tensor.info.dtype == dtype else _cast(tensor, dtype)


def _cast(tensor: Expression, dtype: DtypeCode) -> Cast:
    return Cast(TensorInfo(dtype, tensor.shape), tensor)


def multiply(one: Expression, other: Expression) -> Elementwise:
    """Multiply two tensors of one dtype and shape.

    Raises:
        ValueError: their dtypes or shapes differ.
    """
    return _elementwise("multiply", one, other)


def add(one: Expression, other: Expression) -> Elementwise:
    """Add two tensors of one dtype and shape.

    Raises:
        ValueError: their dtypes or shapes differ.
    """
    return _elementwise("add", one, other)


def is_computed(tensor: Expression) -> bool:
    """Return whether some of its values are a sum or a product."""
    return isinstance(tensor, Elementwise) or any(map(is_computed, tensor.operands))


def _elementwise(operator: Operator, one: Expression, other: Expression) -> Elementwise:
    if one.info != other.info:
        raise ValueError(f"{operator}: {one.info} and {other.info} differ")
    return Elementwise(one.info, operator, one, other)
