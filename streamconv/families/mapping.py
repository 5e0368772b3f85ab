"""Applies rules to tensors: from sources to targets, and back.

Every source key matches exactly one rule and every target is made exactly once; all violations are listed in one error.
"""

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from streamconv.errors import MappingError
from streamconv.families.expected import copies, expand
from streamconv.families.fit import require_fit, shapes_by_name
from streamconv.families.operations import Chunk, Dims, NoInverseError
from streamconv.families.patterns import Indexes, Patterns, indexes_of, substitute_indexes
from streamconv.families.rules import Rule
from streamconv.tensors.computed import cast
from streamconv.tensors.constants import placeholder
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import DtypeCode, TensorInfo
from streamconv.tensors.shapes import TooManyPartsError


def map_tensors(
    rules: Iterable[Rule],
    tensors: Mapping[str, Expression],
    dims: Dims,
    counts: Indexes,
    where: str,
    known_problems: Sequence[str] = (),
    display_names: Mapping[str, str] | None = None,
    dtype: DtypeCode | None = None,
) -> dict[str, Expression]:
    """Return the targets by name, in the order of the rules.

    ``known_problems`` are listed together with those found here, in which ``display_names`` replace the keys.
    ``dtype`` is the one that all targets will be cast to; if it is given, weights may have different dtypes.

    Raises:
        MappingError: source keys are missing, match no rule, or have another shape; or a target would have too many
            parts.
    """
    with_source = [rule for rule in rules if rule.value is None]
    kept, dropped = ([rule for rule in with_source if bool(rule.targets) == is_kept] for is_kept in (True, False))
    shapes, optional = (
        shapes_by_name({key: shape for rule in each for key, shape in rule.source_shapes(dims).items()}, counts)
        for each in (kept, dropped)
    )
    one_dtype = None if dtype is not None else "a model has one: choose it with --dtype"
    require_fit(tensors, shapes, where, known_problems, display_names or {}, one_dtype, optional=optional)
    targets: dict[str, Expression] = {}
    problems = []
    for rule in kept:
        for keys, names in rule.repetitions(counts):
            if not targets.keys().isdisjoint(names):
                raise ValueError(f"two rules make {' or '.join(names)}")  # a mistake in a family, not in a checkpoint
            try:
                made = rule.apply(_as_combined([tensors[key] for key in keys], rule, dtype), dims)
            except TooManyPartsError as error:
                problems.append(f"{' and '.join(names)}: {error}")
            else:
                targets |= zip(names, made, strict=True)
    if problems:
        raise MappingError(f"{where} has tensors that would be read in too many parts:", problems)
    return targets


def _as_combined(tensors: list[Expression], rule: Rule, dtype: DtypeCode | None) -> list[Expression]:
    """Cast tensors of different dtypes before they are combined, and any whose result is rounded."""
    is_rounded = any(operation.rounds for operation in rule.operations)
    if dtype is None or (len({tensor.info.dtype for tensor in tensors}) == 1 and not is_rounded):
        return tensors
    return [cast(tensor, dtype) for tensor in tensors]


def invert(
    rules: Iterable[Rule],
    tensors: Mapping[str, Expression],
    dims: Dims,
    counts: Indexes,
    where: str,
    known_problems: Sequence[str] = (),
) -> dict[str, Expression]:
    """Run `map_tensors` backwards: return the sources of the targets ``tensors``, in the order of `expand`.

    Raises:
        MappingError: targets are missing, are made by no rule, or have another shape; or a rule has no inverse.
    """
    with_source = [rule for rule in rules if rule.value is None]
    lost = [
        f"{rule.sources[0]}: {rule.drop_reason}"
        for rule in with_source
        if not rule.targets and rule.restored is None and not rule.copy_of
    ]
    if lost:
        raise MappingError(
            f"{where} cannot be reverted, because its conversion drops tensors that cannot be restored:", lost
        )
    shapes = {name: shape for rule in with_source for name, shape in rule.target_shapes(dims, counts).items()}
    require_fit(tensors, shapes_by_name(shapes, counts), where, known_problems, {})
    sources: dict[str, Expression] = {}
    for rule in with_source:
        for keys, names in rule.repetitions(counts) if not rule.copy_of else ():
            try:
                sources |= zip(keys, _undone(rule, [tensors[name] for name in names], dims, counts), strict=True)
            except (NoInverseError, TooManyPartsError) as error:
                problems = [f"{' and '.join(rule.sources)}: {error}"]
                raise MappingError(
                    f"{where} cannot be reverted, because its conversion has no inverse:", problems
                ) from error
    sources |= {key: sources[original] for key, original in copies(with_source).items()}
    return {key: sources[key] for key in expand(with_source, dims, counts)}


def _undone(rule: Rule, targets: Sequence[Expression], dims: Dims, counts: Indexes) -> list[Expression]:
    return [rule.restored] if rule.restored is not None else rule.undo(targets, dims, counts)


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a source in a converted model: the targets ``names``, from which ``rule`` restores it.

    ``index`` is the place of the source among those that the rule restores. Without a rule, it is the target itself.
    """

    names: tuple[str, ...]
    rule: Rule | None = None
    index: int = 0

    @property
    def is_concatenated(self) -> bool:
        """True if the source is its target, or the concatenation of its targets along dim 0."""
        if self.rule is None:
            return True
        operations = self.rule.operations
        return len(self.rule.sources) == 1 and all(isinstance(each, Chunk) and each.dim == 0 for each in operations)

    def join(self, targets: Sequence[Expression], dims: Dims, counts: Indexes) -> Expression:
        """Return the source, made from its targets.

        Raises:
            NoInverseError: the rule has no inverse, or none without ``dims`` and ``counts``.
            ValueError: the targets do not fit each other.
        """
        return targets[0] if self.rule is None else self.rule.undo(targets, dims, counts)[self.index]

    def info(self, targets: Sequence[TensorInfo]) -> TensorInfo:
        """Return the dtype and shape of the source; no shape if it depends on the family's symbols."""
        try:
            return self.join([placeholder(info) for info in targets], {}, {}).info
        except NoInverseError:
            return TensorInfo(targets[0].dtype, ())


def joined(
    origins: Mapping[str, Origin], parts: Mapping[str, Sequence[Expression]], dims: Dims, counts: Indexes, where: str
) -> dict[str, Expression]:
    """Return the sources of a converted model.

    If the targets of a source do not fit each other, it is the first of them, so that the wrong shape is reported.

    Raises:
        MappingError: the conversion of some targets has no inverse.
    """
    sources, problems = {}, []
    for key, targets in parts.items():
        sources[key] = targets[0]
        if key not in origins:
            continue
        try:
            sources[key] = origins[key].join(targets, dims, counts)
        except NoInverseError as error:
            problems.append(f"{key}: {error}")
        except ValueError:
            pass
    if problems:
        raise MappingError(f"{where} cannot be read back, since its conversion has no inverse:", problems)
    return sources


def origins_of(rules: Iterable[Rule], targets: Mapping[str, TensorInfo]) -> dict[str, Origin]:
    """Return the origin of each source in a converted model. A target that fits no rule is its own source."""
    rules = tuple(rules)
    makers = Patterns((target, rule) for rule in rules if rule.value is None for target in rule.targets)
    origins: dict[str, Origin] = {}
    done: set[str] = set()
    for name in targets:
        if name not in done:
            names, found = _origins(name, makers, targets)
            done |= names
            origins |= found
    return origins | {key: origins[original] for key, original in copies(rules).items() if original in origins}


def _origins(
    name: str, makers: Patterns[Rule], targets: Mapping[str, TensorInfo]
) -> tuple[set[str], dict[str, Origin]]:
    """Return the targets that belong together with ``name``, and their sources."""
    # Rules with more targets first: one that leaves out parts of its source has some of the targets of another.
    for rule, values in sorted(makers.find(name), key=lambda found: -len(found[0].targets)):
        repeated = {index: values[index] for index in rule.repeating}
        names = [each for pattern in rule.targets for each in _present(substitute_indexes(pattern, repeated), targets)]
        if len(names) < len(rule.targets):
            continue
        if not rule.operations:
            sources = [substitute_indexes(pattern, repeated) for pattern in rule.sources]
            return {*names}, {source: Origin((each,)) for source, each in zip(sources, names, strict=True)}
        try:
            count = len(rule.undo([placeholder(targets[each]) for each in names], {}, {}))
        except NoInverseError:
            count = len(rule.sources)
        except ValueError:  # they do not fit each other
            continue
        sources = [
            substitute_indexes(pattern, dict.fromkeys(indexes_of(pattern), i) | repeated)
            for pattern in rule.sources
            for i in range(count // len(rule.sources))
        ]
        return {*names}, {source: Origin(tuple(names), rule, i) for i, source in enumerate(sources)}
    return {name}, {name: Origin((name,))}


def _present(pattern: str, names: Container[str]) -> Iterator[str]:
    """Yield the names that a pattern expands to, as far as ``names`` has them: from index 0 up to the first gap."""
    numbers = itertools.count() if indexes_of(pattern) else range(1)
    each = (substitute_indexes(pattern, dict.fromkeys(indexes_of(pattern), i)) for i in numbers)
    return itertools.takewhile(names.__contains__, each)
