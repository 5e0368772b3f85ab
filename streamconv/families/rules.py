"""Rules that turn source tensors into target tensors: data, matched against whole keys.

``{i}`` in a pattern is one dot-free part of a key. Every source key matches exactly one rule and every target is made
exactly once; all violations are listed in one error. A rule also states its source's shape in symbols, so the rules
describe a complete checkpoint. Read from right to left, they turn targets back into sources.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from streamconv.display import first_few
from streamconv.errors import MappingError
from streamconv.families.expected import ExpandedNames, numbered
from streamconv.tensors.expressions import Expression, concat
from streamconv.tensors.info import DTYPES, DtypeCode

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """A pattern of source keys, their shape in symbols, and the targets that the tensor is cut into along dim 0.

    ``shape`` is None if any shape will do. A rule with a ``value`` has no source: its target is filled with the value.
    A rule with a ``drop_reason`` has no target.
    """

    source: str
    shape: tuple[str, ...] | None
    targets: tuple[str, ...]
    value: float | None = None
    drop_reason: str = ""


def rename(source: str, target: str, shape: str) -> Rule:
    """Give a tensor another name. ``shape`` is symbols separated by spaces: ``"1 N D"``."""
    return Rule(source, tuple(shape.split()), (target,))


def chunk(source: str, targets: tuple[str, ...], shape: str) -> Rule:
    """Cut a tensor into equal parts along dim 0, in the order of ``targets``, as torch.chunk does."""
    return Rule(source, tuple(shape.split()), targets)


def fill(target: str, value: float, shape: str) -> Rule:
    """Make a tensor that no source has, filled with ``value``."""
    return Rule("", tuple(shape.split()), (target,), value)


def drop(source: str, reason: str, shape: str | None = None) -> Rule:
    """Leave a tensor out, if it is there. ``shape`` is checked if it is given."""
    return Rule(source, None if shape is None else tuple(shape.split()), (), drop_reason=reason)


def without_fills(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the rules for a model that has all targets: each filled target becomes a source of the same name."""
    return tuple(rule if rule.value is None else replace(rule, source=rule.targets[0], value=None) for rule in rules)


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A source tensor that a rule matches: its shape in numbers, None for any, and the names of its targets."""

    rule: Rule
    shape: Shape | None
    targets: tuple[str, ...]


def expand(rules: Iterable[Rule], dims: Mapping[str, int], count: int) -> Mapping[str, ExpectedTensor]:
    """Return every source key that the rules match; rules that fill have none.

    ``dims`` gives the symbols' numbers (a number is itself); ``count`` is how many values ``{i}`` takes, from 0. The
    keys are in the order of `ExpandedNames`.
    """

    def expected(rule: Rule) -> Callable[[int], ExpectedTensor]:
        shape = _numbers(rule, dims)
        return lambda i: ExpectedTensor(rule, shape, tuple(numbered(target, i) for target in rule.targets))

    return ExpandedNames({rule.source: expected(rule) for rule in rules if rule.value is None}, count)


def _numbers(rule: Rule, dims: Mapping[str, int]) -> Shape | None:
    return None if rule.shape is None else tuple(int(s) if s.isdigit() else dims[s] for s in rule.shape)


def map_tensors(
    rules: Iterable[Rule],
    tensors: Mapping[str, Expression],
    dims: Mapping[str, int],
    count: int,
    where: str,
    known_problems: Sequence[str] = (),
    display_names: Mapping[str, str] | None = None,
    is_cast: bool = False,
) -> dict[str, Expression]:
    """Return the targets by name, in the order of the rules.

    ``known_problems`` are listed together with those found here, in which ``display_names`` replace the keys.
    Different dtypes of weights are accepted if all tensors will be cast to one.

    Raises:
        MappingError: source keys are missing, match no rule, or have another shape.
    """
    with_source = [rule for rule in rules if rule.value is None]
    kept = [rule for rule in with_source if not rule.drop_reason]
    shapes, optional = (
        ExpandedNames({rule.source: _constant(_numbers(rule, dims)) for rule in each}, count)
        for each in (kept, [rule for rule in with_source if rule.drop_reason])
    )
    one_dtype = None if is_cast else "a model has one: choose it with --dtype"
    _require_fit(tensors, shapes, where, known_problems, display_names or {}, one_dtype, optional=optional)
    targets: dict[str, Expression] = {}
    for key, each in expand(kept, dims, count).items():
        tensor = tensors[key]
        parts = tensor.chunk(len(each.targets)) if len(each.targets) > 1 else [tensor]
        for name, part in zip(each.targets, parts, strict=True):
            if name in targets:
                raise ValueError(f"two rules make {name}")  # a mistake in a family, not in a checkpoint
            targets[name] = part
    return targets


def invert(
    rules: Iterable[Rule],
    tensors: Mapping[str, Expression],
    dims: Mapping[str, int],
    count: int,
    where: str,
    known_problems: Sequence[str] = (),
) -> dict[str, Expression]:
    """Run `map_tensors` backwards: return the sources of the targets ``tensors``, in the order of `expand`.

    Raises:
        MappingError: targets are missing, are made by no rule, or have another shape; or a rule has no inverse.
    """
    with_source = [rule for rule in rules if rule.value is None]
    lost = [f"{rule.source}: {rule.drop_reason}" for rule in with_source if rule.drop_reason]
    if lost:
        raise MappingError(f"{where} cannot be reverted: its conversion drops tensors, which cannot be restored:", lost)
    parts = {target: _constant(_part(rule, dims)) for rule in with_source for target in rule.targets}
    _require_fit(tensors, ExpandedNames(parts, count), where, known_problems, {})
    expected = expand(with_source, dims, count)
    return {key: concat([tensors[name] for name in each.targets]) for key, each in expected.items()}


def _part(rule: Rule, dims: Mapping[str, int]) -> Shape | None:
    """Return the shape of one of the equal parts that a tensor is cut into."""
    shape = _numbers(rule, dims)
    return shape and (shape[0] // len(rule.targets), *shape[1:])


def _constant(shape: Shape | None) -> Callable[[int], Shape | None]:
    return lambda i: shape


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
        if is_expected := name in expected:
            missing -= 1
            dtypes.setdefault(tensor.info.dtype, []).append(display_names.get(name, name))
        elif name not in optional:
            unexpected.append(name)
            continue
        shape = (expected if is_expected else optional)[name]
        if shape is not None and tensor.info.shape != shape:
            wrong.append((name, shape))
    wrong_dtypes = _dtype_problems(dtypes, one_dtype)
    problems = chain(  # formatted lazily: there may be millions, and the error keeps the first of them
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


def constants(rules: Iterable[Rule], dims: Mapping[str, int], count: int) -> dict[str, tuple[float, tuple[int, ...]]]:
    """Return the targets that no source has, by name: their values and shapes."""
    return {
        target.format(i=i): (rule.value, _numbers(rule, dims) or ())
        for rule in rules
        if rule.value is not None
        for target in rule.targets
        for i in (range(count) if "{i}" in target else (0,))
    }


def count_of(pattern: str, names: Iterable[str]) -> int:
    """Count the values from 0 on that ``{i}`` of ``pattern`` takes among ``names``; gaps are counted too."""
    regex = re.compile(re.escape(pattern).replace(r"\{i\}", "(0|[1-9][0-9]{0,5})"))
    found = [int(match[1]) for name in names if (match := regex.fullmatch(name))]
    # One stray huge number is an unexpected key, not the reason to miss thousands.
    return next((top + 1 for top in sorted(found, reverse=True) if top < 2 * len(found)), 0)
