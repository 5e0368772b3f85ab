"""Rules that turn source tensors into target tensors: data, matched against whole keys.

A rule names its sources and targets with patterns (`patterns`), and the operations between them (`operations`). It also
states the shapes of its sources in symbols, so the rules describe a complete checkpoint. Read from right to left, they
turn targets back into sources. `mapping` applies them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from streamconv.families.operations import (
    Chunk,
    Concat,
    Dims,
    Multiply,
    Omit,
    Operation,
    Permute,
    Reshape,
    Stack,
    Symbols,
    Transpose,
    resolve_shape,
)
from streamconv.families.patterns import Indexes, all_values, count_of, indexes_of, substitute_indexes
from streamconv.tensors.constants import placeholder
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import DtypeCode, TensorInfo

__all__ = [
    "Rule", "chunk", "concat", "convert", "count_of", "drop", "fill", "multiply", "permute", "rename", "reshape",
    "stack", "transpose",
]  # fmt: skip

Shape = tuple[int, ...]
_Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """Patterns of source keys with their shapes in symbols, and the operations that turn them into targets.

    An index in sources and targets repeats the rule. One in the sources alone gathers several tensors, and one in the
    targets alone spreads them, in the order of the index; the patterns follow one after the other.

    A shape of None accepts any. A rule with a ``value`` has no source: its target is filled with the value. A rule with
    a ``drop_reason`` has no target, and its source may be missing. The inverse writes ``restored`` in its place, or the
    source that it is a ``copy_of``; without either, the tensor cannot be restored.
    """

    sources: tuple[str, ...]
    shapes: tuple[Symbols | None, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    value: float | None = None
    drop_reason: str = ""
    restored: Expression | None = None
    copy_of: str = ""

    @cached_property
    def repeating(self) -> tuple[str, ...]:
        """The indexes that repeat the rule."""
        sources, targets = indexes_of(*self.sources), indexes_of(*self.targets)
        if not self.sources or not self.targets:
            return sources + targets
        return tuple(index for index in sources if index in targets)

    def names(self, values: Indexes, counts: Indexes) -> tuple[list[str], list[str]]:
        """Return the keys of the sources and the names of the targets for one repetition."""
        return self._names(self.sources, values, counts), self._names(self.targets, values, counts)

    def _names(self, patterns: tuple[str, ...], values: Indexes, counts: Indexes) -> list[str]:
        if all(len(indexes_of(pattern)) <= len(values) for pattern in patterns):  # a fast path for most rules
            return [substitute_indexes(pattern, values) for pattern in patterns]
        return [
            substitute_indexes(pattern, {**values, **each})
            for pattern in patterns
            for each in all_values(self._own(pattern), counts)
        ]

    def repetitions(self, counts: Indexes) -> Iterator[tuple[list[str], list[str]]]:
        """Yield the sources and targets of each repetition."""
        for values in all_values(self.repeating, counts):
            yield self.names(values, counts)

    def is_under(self, prefix: str) -> bool:
        """Return whether its sources have this prefix."""
        return any(source.startswith(prefix) for source in self.sources)

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        """Return the targets of one repetition, made from its sources."""
        results = list(tensors)
        for operation in self.operations:
            results = operation.apply(results, dims)
        return results

    def undo(self, targets: Sequence[Expression], dims: Dims, counts: Indexes) -> list[Expression]:
        """Return the sources of one repetition, made from its targets.

        ``dims`` and ``counts`` may be empty if they are not known; some operations then have no inverse.

        Raises:
            NoInverseError: an operation has no inverse, or none without ``dims`` and ``counts``.
            ValueError: the targets do not fit each other.
        """
        before: list[list[TensorInfo] | None] = []
        results = self._placeholders(targets[0].info.dtype, dims, counts) if self.operations else None
        for operation in self.operations:
            before.append(None if results is None else [each.info for each in results])
            results = None if results is None else operation.apply(results, dims)
        tensors = list(targets)
        for operation, infos in zip(reversed(self.operations), reversed(before), strict=True):
            tensors = operation.undo(tensors, infos)
        return tensors

    def _placeholders(self, dtype: DtypeCode, dims: Dims, counts: Indexes) -> list[Expression] | None:
        """Return tensors with the shapes of the sources of one repetition; None if a symbol is not known."""
        try:
            return [
                placeholder(TensorInfo(dtype, resolve_shape(shape or (), dims)))
                for pattern, shape in zip(self.sources, self.shapes, strict=True)
                for _ in range(math.prod(counts[index] for index in self._own(pattern)))
            ]
        except KeyError:
            return None

    def _own(self, pattern: str) -> list[str]:
        """Return the indexes of a pattern that do not repeat the rule, but gather or spread tensors."""
        return [index for index in indexes_of(pattern) if index not in self.repeating]

    @property
    def omits(self) -> bool:
        """True if the rule leaves out parts of its sources."""
        return any(isinstance(operation, Omit) for operation in self.operations)

    def left_out(self, sources: Sequence[Expression], dims: Dims) -> Iterator[tuple[str, TensorInfo]]:
        """Yield each tensor that one repetition leaves out: the reason, and the dtype and shape."""
        if self.drop_reason:
            yield from ((self.drop_reason, source.info) for source in sources)
        results = list(sources)
        for operation in self.operations:
            if isinstance(operation, Omit):
                yield operation.reason, results[operation.index].info
            results = operation.apply(results, dims)

    def restorations(self) -> Iterator[str]:
        """Yield the sources that `undo` fills with fixed values, as text with the reason why they were left out."""
        if self.restored is not None:
            yield f"{self.sources[0]}: {self.drop_reason}"
        for operation in self.operations:
            if isinstance(operation, Omit):
                yield f"{' and '.join(self.sources)} (a part): {operation.reason}"

    def source_shapes(self, dims: Dims) -> dict[str, Shape | None]:
        """Return the shape of each source pattern; None accepts any."""
        pairs = zip(self.sources, self.shapes, strict=True)
        return {pattern: None if shape is None else resolve_shape(shape, dims) for pattern, shape in pairs}

    def target_shapes(self, dims: Dims, counts: Indexes) -> dict[str, Shape | None]:
        """Return the shape of each target pattern; None if it is not known."""
        sources = None if None in self.shapes else self._placeholders("F32", dims, counts)
        try:
            results = self.apply(sources or [], dims)
        except ValueError:  # impossible sizes, which the family's own problems describe
            results = []
        if not results or not self.targets:
            return dict.fromkeys(self.targets)
        step = len(results) // len(self.targets)
        return dict(zip(self.targets, (each.shape for each in results[::step]), strict=True))


def _symbols(shape: str) -> Symbols:
    return tuple(shape.split())


def convert(sources: _Names, targets: _Names, shapes: _Names, *operations: Operation) -> Rule:
    """Make targets from sources by any operations, applied in this order to the list of the sources.

    A single name or shape may be given as a string; ``shapes`` are symbols separated by spaces: ``"1 N D"``. Without
    operations, each source is renamed to the target in the same place, and all targets must be there to undo the rule.
    """
    source_names, target_names, symbols = (
        (each,) if isinstance(each, str) else each for each in (sources, targets, shapes)
    )
    return Rule(source_names, tuple(map(_symbols, symbols)), target_names, operations)


def rename(source: str, target: str, shape: str) -> Rule:
    """Give a tensor another name. ``shape`` is symbols separated by spaces: ``"1 N D"``."""
    return convert(source, target, shape)


def chunk(source: str, targets: tuple[str, ...], shape: str, dim: int = 0) -> Rule:
    """Cut a tensor into equal parts along ``dim``, in the order of ``targets``, as torch.chunk does."""
    return convert(source, targets, shape, *([Chunk(len(targets), dim)] if len(targets) > 1 else []))


def concat(sources: tuple[str, ...], target: str, shapes: tuple[str, ...], dim: int = 0) -> Rule:
    """Concatenate tensors along ``dim``, as torch.cat does."""
    return convert(sources, target, shapes, Concat(dim))


def stack(sources: _Names, target: str, shape: str, dim: int = 0) -> Rule:
    """Concatenate tensors of one shape along a new dimension, as torch.stack does.

    The sources are several patterns, or one with an index that ``target`` does not have:
    ``stack("experts.{e}.weight", "experts.weight", "F D")``.
    """
    names = (sources,) if isinstance(sources, str) else sources
    return convert(names, target, (shape,) * len(names), Stack(dim))


def permute(source: str, target: str, shape: str, dims: tuple[int, ...]) -> Rule:
    """Put the dimensions of a tensor in another order, as torch.permute does."""
    return convert(source, target, shape, Permute(dims))


def transpose(source: str, target: str, shape: str, one: int = 0, other: int = 1) -> Rule:
    """Swap two dimensions of a tensor, as torch.transpose does."""
    return convert(source, target, shape, Transpose(one, other))


def reshape(source: str, target: str, shape: str, new_shape: str) -> Rule:
    """Give a tensor another shape, as torch.reshape does. Both shapes are symbols."""
    return convert(source, target, shape, Reshape(_symbols(new_shape)))


def multiply(sources: tuple[str, str], target: str, shape: str) -> Rule:
    """Multiply two tensors of one shape, element by element. It has no inverse."""
    return convert(sources, target, (shape, shape), Multiply())


def fill(target: str, value: float, shape: str) -> Rule:
    """Make a tensor that no source has, filled with ``value``."""
    return Rule((), (_symbols(shape),), (target,), value=value)


def drop(
    source: str, reason: str, shape: str | None = None, restored: Expression | None = None, copy_of: str = ""
) -> Rule:
    """Leave a tensor out, if it is there. ``shape`` is checked if it is given.

    When the conversion is reverted, ``restored`` is written in its place, or the source that it is a ``copy_of``;
    without either, reverting is refused. ``source`` and ``copy_of`` are then names without indexes.
    """
    shapes = (None if shape is None else _symbols(shape),)
    return Rule((source,), shapes, (), drop_reason=reason, restored=restored, copy_of=copy_of)
