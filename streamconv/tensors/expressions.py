"""Expressions: tensors that are not read yet, as data. Their leaves are strided views of records in files.

Nothing here opens a file. Views fold into the leaves at once, so they cost nothing when bytes are read, which `tiles`
and `evaluation` do. Those that one read cannot always express, such as `reshape`, are in `concatenation`. Shapes,
strides and dims are those of torch: strides are in elements, as in ``torch._utils._rebuild_tensor_v2``. Offsets are in
bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from streamconv.files.base import ByteRange, FileRef
from streamconv.tensors.info import TensorInfo, contiguous_strides
from streamconv.tensors.shapes import Shape, view_strides


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
