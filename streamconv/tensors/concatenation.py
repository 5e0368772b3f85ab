"""Tensors of several parts: concatenations, and the views that may take one.

Neighbours in one record become one read again, so that a tensor that was cut and put together costs nothing.
"""

import math
from bisect import bisect, bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from streamconv.tensors.expressions import Expression, Read
from streamconv.tensors.info import TensorInfo, contiguous_strides
from streamconv.tensors.shapes import MAX_PARTS, Shape, TooManyPartsError, groups


@dataclass(frozen=True, slots=True)
class Concat(Expression):
    """Two or more tensors of equal dtypes that are concatenated along ``dim``; `concat` makes them.

    ``ends`` is where each part ends along ``dim``.
    """

    info: TensorInfo
    dim: int
    parts: tuple[Expression, ...]
    ends: tuple[int, ...] = field(compare=False, repr=False)

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.parts

    def with_operands(self, operands: Sequence[Expression]) -> "Concat":
        return Concat(self.info, self.dim, tuple(operands), self.ends)

    @property
    def fingerprint(self) -> str:
        return f"{self.dim}:{self.ends}:{self.operands_fingerprint}"

    def narrow(self, dim: int, start: int, length: int) -> Expression:
        if dim != self.dim:
            shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
            parts = tuple(part.narrow(dim, start, length) for part in self.parts)
            return Concat(TensorInfo(self.info.dtype, shape), self.dim, parts, self.ends)
        if not length:
            return self.parts[0].narrow(dim, 0, 0)
        first, last = bisect(self.ends, start), bisect_left(self.ends, start + length)
        found = [*self.parts[first : last + 1]]
        if (rest := self.ends[last] - start - length) > 0:
            found[-1] = found[-1].narrow(dim, 0, found[-1].shape[dim] - rest)
        if (skipped := start - (self.ends[first - 1] if first else 0)) > 0:
            found[0] = found[0].narrow(dim, skipped, found[0].shape[dim] - skipped)
        return _concat(found, dim)

    def permute(self, dims: Sequence[int]) -> Expression:
        return concat([part.permute(dims) for part in self.parts], [*dims].index(self.dim))

    def view(self, shape: Shape) -> Expression | None:
        at = new_at = 0
        for old, new in groups(self.shape, shape):
            if at <= self.dim < at + len(old):
                before, inner = old[: self.dim - at], math.prod(old[self.dim - at + 1 :])
                lead = next((i for i, size in enumerate(new) if size != 1), 0)
                row = math.prod(new[lead + 1 :])
                sizes = [part.shape[self.dim] * inner for part in self.parts]
                if any(size != 1 for size in before) or any(size % row for size in sizes):
                    return None
                dim = new_at + lead
                shapes = ((*shape[:dim], size // row, *shape[dim + 1 :]) for size in sizes)
                return concat([reshape(part, each) for part, each in zip(self.parts, shapes, strict=True)], dim)
            at, new_at = at + len(old), new_at + len(new)
        raise ValueError(f"{self.info} has no dim {self.dim}")


def concat(tensors: Sequence[Expression], dim: int = 0) -> Expression:
    """Concatenate tensors along ``dim``, like torch.cat. Neighbours in one record become one read.

    Raises:
        ValueError: their dtypes differ, or their shapes in other dimensions, or they do not have dimension ``dim``.
    """
    if len(tensors) == 1:  # which may be a scalar
        return tensors[0]
    first = tensors[0]
    if dim >= len(first.shape):
        raise ValueError(f"{first.info} has no dim {dim} to be concatenated along")
    parts: list[Expression] = []
    for tensor in tensors:
        is_alike = tensor.info.dtype == first.info.dtype and len(tensor.shape) == len(first.shape)
        if not is_alike or _without(tensor, dim) != _without(first, dim):
            raise ValueError(f"{first.info} and {tensor.info} cannot be concatenated along dim {dim}")
        for part in tensor.parts if isinstance(tensor, Concat) and tensor.dim == dim else (tensor,):
            if parts and (joined := _joined(parts[-1], part, dim)) is not None:
                parts[-1] = joined
            elif part.shape[dim]:
                parts.append(part)
    return _concat(parts or tensors[:1], dim)


def _concat(parts: Sequence[Expression], dim: int) -> Expression:
    if len(parts) == 1:
        return parts[0]
    ends = tuple(accumulate(part.shape[dim] for part in parts))
    shape = (*parts[0].shape[:dim], ends[-1], *parts[0].shape[dim + 1 :])
    return Concat(TensorInfo(parts[0].info.dtype, shape), dim, tuple(parts), ends)


def stack(tensors: Sequence[Expression], dim: int = 0) -> Expression:
    """Concatenate tensors along a new dimension, like torch.stack."""
    return concat([unsqueeze(tensor, dim) for tensor in tensors], dim)


def _without(tensor: Expression, dim: int) -> Shape:
    return (*tensor.shape[:dim], *tensor.shape[dim + 1 :])


def _joined(one: Expression, other: Expression, dim: int) -> Read | None:
    """Return two neighbours as one read, if its strides can express it."""
    if not isinstance(one, Read) or not isinstance(other, Read) or one.record != other.record:
        return None
    sizes = one.shape[dim], other.shape[dim]
    if not all(sizes):
        return None
    stride, rest = divmod(other.offset - one.offset, sizes[0] * one.info.itemsize)
    strides = (*one.strides[:dim], stride, *one.strides[dim + 1 :])
    has_strides = (
        all(n == 1 or have == want for n, have, want in zip(each.shape, each.strides, strides, strict=True))
        for each in (one, other)
    )
    if rest or stride < 0 or not all(has_strides):
        return None
    shape = (*one.shape[:dim], sum(sizes), *one.shape[dim + 1 :])
    return Read(TensorInfo(one.info.dtype, shape), one.record, one.offset, strides)


def reshape(tensor: Expression, shape: Shape) -> Expression:
    """Return the same values, in row-major order, in another shape, like torch.reshape.

    If the strides of one read cannot express it, it becomes a `Concat` of several.

    Raises:
        ValueError: the shape has another number of elements.
        TooManyPartsError: it would become too many parts.
    """
    if math.prod(shape) != math.prod(tensor.shape):
        raise ValueError(f"{tensor.info} cannot have the shape {list(shape)}")
    if shape == tensor.shape:
        return tensor
    if not tensor.info.nbytes:
        first = next(tensor.leaves())
        return Read(TensorInfo(tensor.info.dtype, shape), first.record, first.offset, contiguous_strides(shape))
    if (whole := tensor.view(shape)) is not None:
        return whole
    result = tensor
    at = 0
    for old, new in groups(tensor.shape, shape):
        result, at = _reshape_dims(result, at, len(old), new), at + len(new)
    return result


def _reshape_dims(tensor: Expression, at: int, count: int, new: Shape) -> Expression:
    """Give ``count`` dimensions from ``at`` on the shape ``new``."""
    before, old, after = tensor.shape[:at], tensor.shape[at : at + count], tensor.shape[at + count :]
    if (whole := tensor.view((*before, *new, *after))) is not None:
        return whole
    lead, new_lead = (next(i for i, size in enumerate(shape) if size != 1) for shape in (old, new))
    parts = math.gcd(old[lead], new[new_lead])
    if parts == 1:  # rows of the old shape are not rows of the new one
        return _reshape_dims(_reshape_dims(tensor, at, count, (math.prod(old),)), at, 1, new)
    if parts > MAX_PARTS:
        raise TooManyPartsError(f"{tensor.info} would become {parts:,} parts")
    smaller = (*new[:new_lead], new[new_lead] // parts, *new[new_lead + 1 :])
    return concat([_reshape_dims(part, at, count, smaller) for part in tensor.chunk(parts, at + lead)], at + new_lead)


def unsqueeze(tensor: Expression, dim: int) -> Expression:
    """Insert a dimension of size 1, like torch.unsqueeze."""
    return reshape(tensor, (*tensor.shape[:dim], 1, *tensor.shape[dim:]))


def index_select(tensor: Expression, dim: int, indexes: Sequence[int]) -> Expression:
    """Return the entries of one dimension with these indexes, in their order, like torch.index_select.

    Raises:
        TooManyPartsError: the indexes have too many runs with equal steps.
    """
    if not indexes:
        return tensor.narrow(dim, 0, 0)
    selected = concat([tensor.narrow(dim, index, 1) for index in indexes], dim)
    if isinstance(selected, Concat) and len(selected.parts) > MAX_PARTS:
        raise TooManyPartsError(f"{tensor.info} would become {len(selected.parts):,} parts")
    return selected
