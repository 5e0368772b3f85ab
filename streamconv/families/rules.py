"""Rules that turn source tensors into target tensors: data, matched against whole keys.

A rule names its sources and targets with patterns (`patterns`), and the operations between them (`operations`). It also
states the shapes of its sources in symbols, so the rules describe a complete checkpoint. Read from right to left, they
turn targets back into sources. `mapping` applies them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    numbers,
)
from streamconv.families.patterns import ExpandedNames, Indexes, all_values, count_of, indexes_of, numbered
from streamconv.tensors.constants import placeholder
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import DtypeCode, TensorInfo

__all__ = [
    "ExpectedTensor", "Rule", "chunk", "concat", "constants", "convert", "copies", "count_of", "drop", "expand", "fill",
    "multiply", "permute", "rename", "reshape", "stack", "transpose", "without_fills",
]  # fmt: skip

Shape = tuple[int, ...]
_Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """Patterns of source keys, their shapes in symbols, the operations on them, and the targets that come out.

    An index in sources and targets repeats the rule. One in the sources alone gathers tensors, and one in the targets
    alone spreads them; they are in the order of the index, for one pattern after the other.

    A shape is None if any will do. A rule with a ``value`` has no source: its target is filled with the value. A rule
    with a ``drop_reason`` has no target, and its source may be missing; ``restored`` is what the inverse puts there,
    or it is ``copy_of`` another source. Without either, it cannot be restored.
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
        if all(len(indexes_of(pattern)) <= len(values) for pattern in patterns):  # by far the most, hence the fast way
            return [numbered(pattern, values) for pattern in patterns]
        return [
            numbered(pattern, {**values, **each})
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
        """Return the sources of one repetition; ``dims`` and ``counts`` may be empty if they are not known.

        Raises:
            NoInverseError: an operation has no inverse, or none without ``dims`` and ``counts``.
            ValueError: the targets do not fit each other.
        """
        before: list[list[TensorInfo] | None] = []
        results = self._stand_ins(targets[0].info.dtype, dims, counts) if self.operations else None
        for operation in self.operations:
            before.append(None if results is None else [each.info for each in results])
            results = None if results is None else operation.apply(results, dims)
        tensors = list(targets)
        for operation, infos in zip(reversed(self.operations), reversed(before), strict=True):
            tensors = operation.undo(tensors, infos)
        return tensors

    def _stand_ins(self, dtype: DtypeCode, dims: Dims, counts: Indexes) -> list[Expression] | None:
        """Return tensors with the shapes of the sources of one repetition; None if they are not known."""
        try:
            return [
                placeholder(TensorInfo(dtype, numbers(shape or (), dims)))
                for pattern, shape in zip(self.sources, self.shapes, strict=True)
                for _ in range(math.prod(counts[index] for index in self._own(pattern)))
            ]
        except KeyError:
            return None

    def _own(self, pattern: str) -> list[str]:
        """Return the indexes of a pattern that do not repeat the rule."""
        return [index for index in indexes_of(pattern) if index not in self.repeating]

    @property
    def omits(self) -> bool:
        """Whether it leaves out parts of its sources."""
        return any(isinstance(operation, Omit) for operation in self.operations)

    def left_out(self, sources: Sequence[Expression], dims: Dims) -> Iterator[tuple[str, TensorInfo]]:
        """Yield what one repetition leaves out of its sources, and why."""
        if self.drop_reason:
            yield from ((self.drop_reason, source.info) for source in sources)
        results = list(sources)
        for operation in self.operations:
            if isinstance(operation, Omit):
                yield operation.reason, results[operation.index].info
            results = operation.apply(results, dims)

    def restorations(self) -> Iterator[str]:
        """Yield what `undo` fills with constants, and why the conversion left it out."""
        if self.restored is not None:
            yield f"{self.sources[0]}: {self.drop_reason}"
        for operation in self.operations:
            if isinstance(operation, Omit):
                yield f"{' and '.join(self.sources)} (a part): {operation.reason}"

    def source_shapes(self, dims: Dims) -> dict[str, Shape | None]:
        """Return the shape of each pattern of sources; None if any will do."""
        pairs = zip(self.sources, self.shapes, strict=True)
        return {pattern: None if shape is None else numbers(shape, dims) for pattern, shape in pairs}

    def target_shapes(self, dims: Dims, counts: Indexes) -> dict[str, Shape | None]:
        """Return the shape of each pattern of targets; None if any will do."""
        sources = None if None in self.shapes else self._stand_ins("F32", dims, counts)
        try:
            made = self.apply(sources or [], dims)
        except ValueError:  # impossible sizes, which the family's own problems describe
            made = []
        if not made or not self.targets:
            return dict.fromkeys(self.targets)
        step = len(made) // len(self.targets)
        return dict(zip(self.targets, (each.shape for each in made[::step]), strict=True))


def _symbols(shape: str) -> Symbols:
    return tuple(shape.split())


def convert(sources: _Names, targets: _Names, shapes: _Names, *operations: Operation) -> Rule:
    """Make targets from sources by any operations, applied in this order to the list of the sources.

    A single name or shape may be given as it is; ``shapes`` are symbols separated by spaces: ``"1 N D"``. Without
    operations, each source is renamed to the target in its place: this rule only applies if all of them are there.
    """
    names, made, symbols = ((each,) if isinstance(each, str) else each for each in (sources, targets, shapes))
    return Rule(names, tuple(map(_symbols, symbols)), made, operations)


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

    ``restored`` is written in its place when the conversion is reverted. Or it is always equal to another source,
    ``copy_of``. Without either, reverting is refused. Both names of a copy are without indexes.
    """
    shapes = (None if shape is None else _symbols(shape),)
    return Rule((source,), shapes, (), drop_reason=reason, restored=restored, copy_of=copy_of)


def without_fills(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the rules for a model that has all targets: each filled target becomes a source of the same name."""
    return tuple(rule if rule.value is None else replace(rule, sources=rule.targets, value=None) for rule in rules)


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A source tensor that a rule matches: its shape in numbers, None for any, and the names of its targets."""

    rule: Rule
    shape: Shape | None
    targets: tuple[str, ...]


def expand(rules: Iterable[Rule], dims: Dims, counts: Indexes) -> Mapping[str, ExpectedTensor]:
    """Return every source key that the rules match; rules that fill have none.

    ``dims`` gives the symbols' numbers; ``counts`` is how many values each index takes, from 0. The keys are in the
    order of `ExpandedNames`.

    Raises:
        ValueError: two rules have the same source, which is a mistake in a family.
    """
    expected = {}
    for rule in rules:
        for place, (pattern, shape) in enumerate(rule.source_shapes(dims).items() if rule.value is None else ()):
            if pattern in expected:
                raise ValueError(f"two rules read {pattern}")
            expected[pattern] = _Expected(rule, place, shape, counts)
    return ExpandedNames(expected, counts)


@dataclass(frozen=True, slots=True)
class _Expected:
    """Makes the expected tensor of one repetition. ``place`` is that of its pattern among the rule's sources."""

    rule: Rule
    place: int
    shape: Shape | None
    counts: Indexes

    def __call__(self, values: Indexes) -> ExpectedTensor:
        repeating = {index: values[index] for index in self.rule.repeating}
        targets = self.rule.names(repeating, self.counts)[1]
        if len(self.rule.sources) > 1 and not self.rule.operations:  # each source is renamed
            targets = targets[self.place : self.place + 1]
        return ExpectedTensor(self.rule, self.shape, tuple(targets))


def copies(rules: Iterable[Rule]) -> dict[str, str]:
    """Return the dropped sources that are copies of others, by name: whose they are."""
    return {rule.sources[0]: rule.copy_of for rule in rules if rule.copy_of}


def constants(rules: Iterable[Rule], dims: Dims, counts: Indexes) -> dict[str, tuple[float, Shape]]:
    """Return the targets that no source has, by name: their values and shapes."""
    return {
        target: (rule.value, numbers(rule.shapes[0] or (), dims))
        for rule in rules
        if rule.value is not None
        for _, targets in rule.repetitions(counts)
        for target in targets
    }
