"""The tensors that a family's rules expect in a checkpoint or make without one, listed for a model of certain sizes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from streamconv.families.operations import Dims, resolve_shape
from streamconv.families.patterns import ExpandedNames, Indexes
from streamconv.families.rules import Rule, Shape


def without_fills(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the rules for a model that has all targets: each filled target becomes a source of the same name."""
    return tuple(rule if rule.value is None else replace(rule, sources=rule.targets, value=None) for rule in rules)


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A source tensor that a rule matches. ``shape`` is in numbers, None for any; ``targets`` are names."""

    rule: Rule
    shape: Shape | None
    targets: tuple[str, ...]


def expand(rules: Iterable[Rule], dims: Dims, counts: Indexes) -> Mapping[str, ExpectedTensor]:
    """Return every source key that the rules match, with what they expect there.

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
    """Map each dropped source that is a copy to the source that it is a copy of."""
    return {rule.sources[0]: rule.copy_of for rule in rules if rule.copy_of}


def constants(rules: Iterable[Rule], dims: Dims, counts: Indexes) -> dict[str, tuple[float, Shape]]:
    """Map each target that is filled without a source to its value and shape."""
    return {
        target: (rule.value, resolve_shape(rule.shapes[0] or (), dims))
        for rule in rules
        if rule.value is not None
        for _, targets in rule.repetitions(counts)
        for target in targets
    }
