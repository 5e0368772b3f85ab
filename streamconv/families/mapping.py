"""Applies rules to tensors: from sources to targets, and back.

Every source key matches exactly one rule and every target is made exactly once; all violations are listed in one error.
"""

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from streamconv.display import first_few
from streamconv.errors import MappingError
from streamconv.families.operations import Dims, NoInverseError
from streamconv.families.patterns import ExpandedNames, Indexes, Patterns, indexes_of, numbered
from streamconv.families.rules import Rule, Shape, copies, expand
from streamconv.tensors.computed import cast
from streamconv.tensors.constants import placeholder
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import DTYPES, DtypeCode, TensorInfo

_UNEXPECTED: Shape = (-1,)


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
    ``dtype`` is that to which all targets will be cast; with it, different dtypes of weights are accepted.

    Raises:
        MappingError: source keys are missing, match no rule, or have another shape.
    """
    with_source = [rule for rule in rules if rule.value is None]
    kept, dropped = ([rule for rule in with_source if bool(rule.targets) == is_kept] for is_kept in (True, False))
    shapes, optional = (
        _by_name({key: shape for rule in each for key, shape in rule.source_shapes(dims).items()}, counts)
        for each in (kept, dropped)
    )
    one_dtype = None if dtype is not None else "a model has one: choose it with --dtype"
    _require_fit(tensors, shapes, where, known_problems, display_names or {}, one_dtype, optional=optional)
    targets: dict[str, Expression] = {}
    for rule in kept:
        for keys, names in rule.repetitions(counts):
            sources = _as_combined([tensors[key] for key in keys], rule, dtype)
            for name, target in zip(names, rule.apply(sources, dims), strict=True):
                if name in targets:
                    raise ValueError(f"two rules make {name}")  # a mistake in a family, not in a checkpoint
                targets[name] = target
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
        raise MappingError(f"{where} cannot be reverted: its conversion drops tensors, which cannot be restored:", lost)
    shapes = {name: shape for rule in with_source for name, shape in rule.target_shapes(dims, counts).items()}
    _require_fit(tensors, _by_name(shapes, counts), where, known_problems, {})
    sources: dict[str, Expression] = {}
    for rule in with_source:
        for keys, names in rule.repetitions(counts) if not rule.copy_of else ():
            try:
                sources |= zip(keys, _undone(rule, [tensors[name] for name in names], dims, counts), strict=True)
            except NoInverseError as error:
                problems = [f"{' and '.join(rule.sources)}: {error}"]
                raise MappingError(f"{where} cannot be reverted, its conversion has no inverse:", problems) from error
    sources |= {key: sources[original] for key, original in copies(with_source).items()}
    return {key: sources[key] for key in expand(with_source, dims, counts)}


def _undone(rule: Rule, targets: Sequence[Expression], dims: Dims, counts: Indexes) -> list[Expression]:
    return [rule.restored] if rule.restored is not None else rule.undo(targets, dims, counts)


@dataclass(frozen=True, slots=True)
class Origin:
    """How a source is made from the targets ``names``: it is the one with this ``index`` of those that ``rule`` undoes.

    Without a rule, it is the target itself.
    """

    names: tuple[str, ...]
    rule: Rule | None = None
    index: int = 0

    def join(self, targets: Sequence[Expression], dims: Dims, counts: Indexes) -> Expression:
        """Return the source.

        Raises:
            NoInverseError: the rule has no inverse, or none without the numbers of all symbols in ``dims``.
        """
        return targets[0] if self.rule is None else self.rule.undo(targets, dims, counts)[self.index]

    def info(self, targets: Sequence[TensorInfo]) -> TensorInfo:
        """Return the dtype and shape of the source; no shape if it follows from the family's symbols alone."""
        try:
            return self.join([placeholder(info) for info in targets], {}, {}).info
        except NoInverseError:
            return TensorInfo(targets[0].dtype, ())


def joined(
    origins: Mapping[str, Origin], parts: Mapping[str, Sequence[Expression]], dims: Dims, counts: Indexes, where: str
) -> dict[str, Expression]:
    """Return the sources of a converted model. A source whose targets do not fit each other is the first of them.

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
        except ValueError:  # their shapes will be reported
            pass
    if problems:
        raise MappingError(f"{where} cannot be read back, its conversion has no inverse:", problems)
    return sources


def origins_of(rules: Iterable[Rule], targets: Mapping[str, TensorInfo]) -> dict[str, Origin]:
    """Return the sources that ``targets`` were made from. A target that fits no rule is its own source."""
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
    # A rule with more targets first: those of another may be some of its own, if it leaves parts of a source out.
    for rule, values in sorted(makers.find(name), key=lambda found: -len(found[0].targets)):
        repeated = {index: values[index] for index in rule.repeating}
        names = [each for pattern in rule.targets for each in _present(numbered(pattern, repeated), targets)]
        if len(names) < len(rule.targets):
            continue
        try:
            count = len(rule.undo([placeholder(targets[each]) for each in names], {}, {}))
        except NoInverseError:
            count = len(rule.sources)
        except ValueError:  # they do not fit each other
            continue
        sources = (
            numbered(pattern, dict.fromkeys(indexes_of(pattern), i) | repeated)
            for pattern in rule.sources
            for i in range(count // len(rule.sources))
        )
        return {*names}, {source: Origin(tuple(names), rule, i) for i, source in enumerate(sources)}
    return {name}, {name: Origin((name,))}


def _present(pattern: str, names: Container[str]) -> Iterator[str]:
    """Yield the names of a pattern that are there; those with an index from 0 on, up to the first gap."""
    numbers = itertools.count() if indexes_of(pattern) else range(1)
    each = (numbered(pattern, dict.fromkeys(indexes_of(pattern), i)) for i in numbers)
    return itertools.takewhile(names.__contains__, each)


def _by_name(shapes: Mapping[str, Shape | None], counts: Indexes) -> ExpandedNames[Shape | None]:
    """Return the shapes of patterns by the names that they stand for."""
    return ExpandedNames({pattern: _constant(shape) for pattern, shape in shapes.items()}, counts)


def _constant(shape: Shape | None) -> Callable[[Indexes], Shape | None]:
    return lambda values: shape


def _require_fit(
    tensors: Mapping[str, Expression],
    expected: Mapping[str, Shape | None],
    where: str,
    known_problems: Sequence[str],
    display_names: Mapping[str, str],
    one_dtype: str | None = "a model has one",
    optional: Mapping[str, Shape | None] | None = None,
) -> None:
    """Compare names, shapes and dtypes. ``optional`` tensors may be missing, and their dtypes do not matter."""
    optional, missing, unexpected, wrong = optional or {}, len(expected), [], []
    dtypes: dict[DtypeCode, list[str]] = {}
    for name, tensor in tensors.items():
        shape = expected.get(name, _UNEXPECTED)
        if shape is not _UNEXPECTED:
            missing -= 1
            dtypes.setdefault(tensor.info.dtype, []).append(display_names.get(name, name))
        elif (shape := optional.get(name, _UNEXPECTED)) is _UNEXPECTED:
            unexpected.append(name)
            continue
        if shape is not None and tensor.info.shape != shape:
            wrong.append((name, shape))
    wrong_dtypes = _dtype_problems(dtypes, one_dtype)
    problems = itertools.chain(  # formatted lazily: there may be millions, and the error keeps the first of them
        known_problems,
        (
            f"missing: {name}{'' if shape is None else f' {list(shape)}'}"
            for name, shape in expected.items()
            if name not in tensors
        ),
        (f"unexpected: {display_names.get(name, name)} {list(tensors[name].info.shape)}" for name in unexpected),
        (
            f"wrong shape: {display_names.get(name, name)} is {list(tensors[name].info.shape)}, not {list(shape)}"
            for name, shape in wrong
        ),
        wrong_dtypes,
    )
    if count := len(known_problems) + missing + len(unexpected) + len(wrong) + len(wrong_dtypes):
        counted = "1 problem" if count == 1 else f"{count:,} problems"
        raise MappingError(f"{where} does not fit ({counted}):", problems, count)


def _dtype_problems(dtypes: Mapping[DtypeCode, Sequence[str]], one_dtype: str | None) -> list[str]:
    """List dtypes that no model has, and a mixture of dtypes. ``dtypes`` maps each to the names of its tensors."""
    known = [code for code, dtype in DTYPES.items() if dtype.is_weight]
    problems = [
        f"wrong dtype: {first_few(names, 1)} in {dtype}; only {', '.join(known)} are converted"
        for dtype, names in dtypes.items()
        if dtype not in known
    ]
    weights = sorted((len(names), dtype) for dtype, names in dtypes.items() if dtype in known)
    if len(weights) > 1 and one_dtype is not None:
        held = " and ".join(f"{dtype} ({first_few(dtypes[dtype], 1)})" for _, dtype in reversed(weights))
        problems.append(f"mixed dtypes: {held}; {one_dtype}")
    return problems
