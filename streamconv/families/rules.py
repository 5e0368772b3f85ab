"""Rules that turn source tensors into target tensors: data, matched against whole keys.

``{i}`` in a pattern is one dot-free part of a key. Every source key matches exactly one rule and every target is made
exactly once; all violations are listed in one error. A rule also states its source's shape in symbols, so the rules
describe a complete checkpoint. Read from right to left, they turn targets back into sources.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from streamconv.errors import MappingError
from streamconv.tensors.expressions import AnyTensor, Joined, SourceTensor, joined


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


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A source tensor that a rule matches: its shape in numbers, None for any, and the names of its targets."""

    rule: Rule
    shape: tuple[int, ...] | None
    targets: tuple[str, ...]


def expand(rules: Iterable[Rule], dims: Mapping[str, int], count: int) -> dict[str, ExpectedTensor]:
    """Return every source key that the rules match; rules that fill have none.

    ``dims`` gives the symbols' numbers (a number is itself); ``count`` is how many values ``{i}`` takes, from 0.
    Consecutive rules with ``{i}`` form a block: all keys of block 0 come first, as in a model's own state dict.
    """
    expected = {}
    with_source = (rule for rule in rules if rule.value is None)
    for is_block, group in groupby(with_source, key=lambda rule: "{i}" in rule.source):
        block = [(rule, _numbers(rule, dims)) for rule in group]
        for i in range(count if is_block else 1):
            for rule, shape in block:
                targets = tuple(target.format(i=i) for target in rule.targets)
                expected[rule.source.format(i=i)] = ExpectedTensor(rule, shape, targets)
    return expected


def _numbers(rule: Rule, dims: Mapping[str, int]) -> tuple[int, ...] | None:
    return None if rule.shape is None else tuple(int(s) if s.isdigit() else dims[s] for s in rule.shape)


def map_tensors(
    rules: Iterable[Rule],
    tensors: Mapping[str, AnyTensor],
    dims: Mapping[str, int],
    count: int,
    where: str,
    known_problems: Iterable[str] = (),
    display_names: Mapping[str, str] | None = None,
    is_cast: bool = False,
) -> dict[str, SourceTensor]:
    """Return the targets by name, in the order of the rules.

    ``known_problems`` are listed together with those found here, in which ``display_names`` replace the keys.
    Mixed dtypes are accepted if all tensors will be cast to one.

    Raises:
        MappingError: source keys are missing, match no rule, or have another shape.
    """
    expected = expand(rules, dims, count)
    kept = {key: each for key, each in expected.items() if not each.rule.drop_reason}
    dropped = {key: each.shape for key, each in expected.items() if each.rule.drop_reason}
    one_dtype = None if is_cast else "a model has one: choose it with --dtype"
    shapes = {key: each.shape for key, each in kept.items()}
    _require_fit(tensors, shapes, where, known_problems, display_names or {}, one_dtype, optional=dropped)
    targets: dict[str, SourceTensor] = {}
    for key, each in kept.items():
        tensor = tensors[key]
        shape = tensor.info.shape
        rows = shape[0] // len(each.targets) if shape and each.targets else 0
        for n, name in enumerate(each.targets):
            if name in targets:
                raise ValueError(f"two rules make {name}")  # a mistake in a family, not in a checkpoint
            if len(each.targets) > 1 or isinstance(tensor, Joined):
                targets[name] = tensor.rows(n * rows, (n + 1) * rows)
            else:
                targets[name] = tensor
    return targets


def invert(
    rules: Iterable[Rule],
    tensors: Mapping[str, SourceTensor],
    dims: Mapping[str, int],
    count: int,
    where: str,
    known_problems: Iterable[str] = (),
) -> dict[str, AnyTensor]:
    """Run `map_tensors` backwards: return the sources of the targets ``tensors``, in the order of `expand`.

    Raises:
        MappingError: targets are missing, are made by no rule, or have another shape; or a rule has no inverse.
    """
    expected = expand(rules, dims, count)
    dropped = {each.rule.source: each.rule.drop_reason for each in expected.values() if each.rule.drop_reason}
    if dropped:
        lost = [f"{source}: {reason}" for source, reason in dropped.items()]
        raise MappingError(f"{where} cannot be reverted: its conversion drops tensors, which cannot be restored:", lost)
    shapes = {name: _part(each) for each in expected.values() for name in each.targets}
    _require_fit(tensors, shapes, where, known_problems, {})
    return {key: joined([tensors[name] for name in each.targets]) for key, each in expected.items()}


def _part(expected: ExpectedTensor) -> tuple[int, ...] | None:
    """Return the shape of one of the equal parts that a tensor is cut into."""
    shape = expected.shape
    return shape and (shape[0] // len(expected.targets), *shape[1:])


def _require_fit(
    tensors: Mapping[str, AnyTensor],
    expected: Mapping[str, tuple[int, ...] | None],
    where: str,
    known_problems: Iterable[str],
    display_names: Mapping[str, str],
    one_dtype: str | None = "a model has one",
    optional: Mapping[str, tuple[int, ...] | None] | None = None,
) -> None:
    """Compare names, shapes and dtypes. ``optional`` tensors may be missing, and their dtypes do not matter."""
    shapes = {name: tensor.info.shape for name, tensor in tensors.items()}
    allowed = {**expected, **(optional or {})}
    problems = [*known_problems]
    problems += [
        f"missing: {name}{'' if shape is None else f' {list(shape)}'}"
        for name, shape in expected.items()
        if name not in shapes
    ]
    problems += [
        f"unexpected: {display_names.get(name, name)} {list(shape)}"
        for name, shape in shapes.items()
        if name not in allowed
    ]
    problems += [
        f"wrong shape: {display_names.get(name, name)} is {list(shapes[name])}, not {list(shape)}"
        for name, shape in allowed.items()
        if shape is not None and shapes.get(name, shape) != shape
    ]
    dtypes = {tensor.info.dtype for name, tensor in tensors.items() if name in expected}
    if len(dtypes) > 1 and one_dtype is not None:
        problems.append(f"mixed dtypes: {', '.join(sorted(dtypes))}; {one_dtype}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
        raise MappingError(f"{where} does not fit ({count}):", problems)


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
