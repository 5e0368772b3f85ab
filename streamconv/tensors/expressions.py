"""Expressions: tensors that are not read yet, as data. Their leaves are strided views of records in files.

Nothing here opens a file. Views (`narrow`, `permute`, `reshape`) fold into the leaves at once, so they cost nothing
when bytes are read, which `tiles` and `evaluation` do. Shapes, strides and dims are those of torch: strides are in
elements, as in ``torch._utils._rebuild_tensor_v2``. Offsets are in bytes.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect, bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from streamconv.files.base import ByteRange, FileRef
from streamconv.tensors.info import TensorInfo, contiguous_strides
from streamconv.tensors.shapes import MAX_PARTS, Shape, TooManyPartsError, groups, view_strides


@dataclass(frozen=True, slots=True)
class Record:
    """A byte range of a file with at most one checksum: a torch storage, or a safetensors tensor.

    ``crc32`` is None if the file has no checksum for it.
    """

    file: FileRef
    name: str
    range: ByteRange
    crc32: int | None = None

    def __hash__(self) -> int:
        # Records are looked up for each tile; hashing all fields, with those of the file, takes ten times as long.
        return hash((self.name, self.range.start))


class Expression(ABC):
    """A tensor that is not read yet, of the dtype and shape ``info``. Its views are expressions, too."""

    __slots__ = ()

    info: TensorInfo

    @property
    @abstractmethod
    def operands(self) -> "tuple[Expression, ...]":
        """The expressions that it is made from; none for a leaf."""

    @abstractmethod
    def with_operands(self, operands: "Sequence[Expression]") -> "Expression":
        """Return the same expression with other operands, which have the same dtypes and shapes."""

    @abstractmethod
    def narrow(self, dim: int, start: int, length: int) -> "Expression":
        """Return ``length`` entries of one dimension from ``start`` on, like torch.narrow."""

    @abstractmethod
    def permute(self, dims: Sequence[int]) -> "Expression":
        """Return the tensor with its dimensions in another order, like torch.permute."""

    @abstractmethod
    def view(self, shape: Shape) -> "Expression | None":
        """Return the same values in another shape; None if that takes more parts. Neither shape contains a 0."""

    @property
    def shape(self) -> Shape:
        return self.info.shape

    @property
    def is_copied(self) -> bool:
        """Return whether its values have the bits of its leaves: nothing is cast or computed."""
        return all(operand.is_copied for operand in self.operands)

    @property
    def fingerprint(self) -> str:
        """A string of record names and offsets, which differs from those of others of the same dtype and shape."""
        return f"{type(self).__name__}:{self.operands_fingerprint}"

    @property
    def operands_fingerprint(self) -> str:
        return f"({','.join(f'{operand.info.dtype} {operand.fingerprint}' for operand in self.operands)})"

    def leaves(self) -> "Iterator[Read]":
        """Yield everything that is read for it, in the order of its values."""
        for operand in self.operands:
            yield from operand.leaves()

    def map_leaves(self, change: "Callable[[Read], Read]") -> "Expression":
        """Return the same expression with each leaf replaced by one of the same dtype and shape."""
        return self.with_operands([operand.map_leaves(change) for operand in self.operands])

    def reshape(self, shape: Shape) -> "Expression":
        """Return the same values, in row-major order, in another shape, like torch.reshape.

        If the strides of one read cannot express it, it becomes a `Concat` of several.

        Raises:
            ValueError: the shape has another number of elements.
            TooManyPartsError: it would become too many parts.
        """
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.info} cannot have the shape {list(shape)}")
        if shape == self.shape:
            return self
        if not self.info.nbytes:
            first = next(self.leaves())
            return Read(TensorInfo(self.info.dtype, shape), first.record, first.offset, contiguous_strides(shape))
        if (whole := self.view(shape)) is not None:
            return whole
        result: Expression = self
        at = 0
        for old, new in groups(self.shape, shape):
            result, at = _reshape_dims(result, at, len(old), new), at + len(new)
        return result

    def transpose(self, one: int, other: int) -> "Expression":
        """Return the tensor with two dimensions swapped, like torch.transpose.

        Raises:
            ValueError: it does not have these dimensions.
        """
        dims = [*range(len(self.shape))]
        if max(one, other) >= len(dims):
            raise ValueError(f"{self.info} has no dim {max(one, other)}")
        dims[one], dims[other] = dims[other], dims[one]
        return self.permute(dims)

    def index_select(self, dim: int, indexes: Sequence[int]) -> "Expression":
        """Return the entries of one dimension with these indexes, in their order, like torch.index_select.

        Raises:
            TooManyPartsError: the indexes have too many runs with equal steps.
        """
        if not indexes:
            return self.narrow(dim, 0, 0)
        tensor = concat([self.narrow(dim, index, 1) for index in indexes], dim)
        if isinstance(tensor, Concat) and len(tensor.parts) > MAX_PARTS:
            raise TooManyPartsError(f"{self.info} would become {len(tensor.parts):,} parts")
        return tensor

    def unsqueeze(self, dim: int) -> "Expression":
        """Insert a dimension of size 1, like torch.unsqueeze."""
        return self.reshape((*self.shape[:dim], 1, *self.shape[dim:]))

    def split(self, sizes: Sequence[int], dim: int = 0) -> "list[Expression]":
        """Cut the tensor into parts of these sizes along ``dim``, like torch.split.

        Raises:
            ValueError: the sizes do not add up to that of the tensor.
        """
        if dim >= len(self.shape) or sum(sizes) != self.shape[dim] or min(sizes, default=0) < 0:
            raise ValueError(f"{self.info} cannot be cut into {list(sizes)} along dim {dim}")
        return [self.narrow(dim, end - size, size) for end, size in zip(accumulate(sizes), sizes, strict=True)]

    def chunk(self, count: int, dim: int = 0) -> "list[Expression]":
        """Cut the tensor into ``count`` equal parts along ``dim``.

        Raises:
            ValueError: the tensor cannot be divided by ``count``.
        """
        if dim >= len(self.shape) or not count or self.shape[dim] % count:
            raise ValueError(f"{self.info} cannot be cut into {count} equal parts along dim {dim}")
        return self.split([self.shape[dim] // count] * count, dim)


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


@dataclass(frozen=True, slots=True)
class Read(Expression):
    """A strided view of a record. ``offset`` is in bytes from the start of the record; strides are not negative."""

    info: TensorInfo
    record: Record
    offset: int
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Return whether its bytes in row-major order are one range of the record."""
        wanted = contiguous_strides(self.info.shape)
        if self.strides == wanted:
            return True
        dims = zip(self.info.shape, self.strides, wanted, strict=True)
        return all(n == 1 or have == want for n, have, want in dims) or not self.info.nbytes

    @property
    def is_constant(self) -> bool:
        """Return whether it is one element of a record, repeated."""
        return self.span == self.info.itemsize

    @property
    def span(self) -> int:
        """The number of bytes in the record from the first element to the last, including gaps."""
        if 0 in self.info.shape:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.info.shape, self.strides, strict=True))
        return (last + 1) * self.info.itemsize

    @property
    def range(self) -> ByteRange:
        """The range of the file from its first element to its last."""
        return ByteRange(self.record.range.start + self.offset, self.span)

    @property
    def operands(self) -> tuple[Expression, ...]:
        return ()

    def with_operands(self, operands: Sequence[Expression]) -> "Read":
        return self

    @property
    def fingerprint(self) -> str:
        return f"{self.record.name}\0{self.offset}\0{self.strides}\0"

    def leaves(self) -> "Iterator[Read]":
        yield self

    def map_leaves(self, change: "Callable[[Read], Read]") -> "Read":
        return change(self)

    def narrow(self, dim: int, start: int, length: int) -> "Read":
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        offset = self.offset + start * self.strides[dim] * self.info.itemsize
        return Read(TensorInfo(self.info.dtype, shape), self.record, offset, self.strides)

    def permute(self, dims: Sequence[int]) -> "Read":
        shape, strides = (tuple(each[dim] for dim in dims) for each in (self.shape, self.strides))
        return Read(TensorInfo(self.info.dtype, shape), self.record, self.offset, strides)

    def view(self, shape: Shape) -> "Read | None":
        strides = view_strides(self.shape, self.strides, shape)
        return None if strides is None else Read(TensorInfo(self.info.dtype, shape), self.record, self.offset, strides)


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
                return concat([part.reshape(each) for part, each in zip(self.parts, shapes, strict=True)], dim)
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
    return concat([tensor.unsqueeze(dim) for tensor in tensors], dim)


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
