"""Rules that turn source tensors into target tensors: data, matched on whole keys.

A pattern's ``{i}`` stands for one dot-free part of a key. Every source key matches exactly one
rule and every target is made exactly once; whatever breaks that is an error that lists it all.
A rule also carries the source's shape in symbols, so that it says what a checkpoint must hold.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from streamconv.errors import MappingError
from streamconv.tensors import SourceTensor, TensorInfo, filled


@dataclass(frozen=True)
class Rule:
    """One source key pattern, its shape in symbols, and the targets that it is cut into on dim 0.

    Without a source the target is ``value`` throughout: what the target's class has, and the source's lacks.
    """

    source: str
    shape: tuple[str, ...]
    targets: tuple[str, ...]
    value: float | None = None


def rename(source: str, target: str, shape: str) -> Rule:
    """The same tensor under another name. ``shape`` is symbols with blanks between: ``"1 N D"``."""
    return Rule(source, tuple(shape.split()), (target,))


def chunk(source: str, targets: tuple[str, ...], shape: str) -> Rule:
    """Equal parts along dim 0, in the order of ``targets``, as torch.chunk cuts them."""
    return Rule(source, tuple(shape.split()), targets)


def fill(target: str, value: float, shape: str) -> Rule:
    """A tensor of ``value`` throughout, which no source has."""
    return Rule("", tuple(shape.split()), (target,), value)


def expand(rules: Iterable[Rule], dims: Mapping[str, int], count: int) -> dict[str, tuple[Rule, tuple[int, ...], str]]:
    """Every source key that the rules ask for: its rule, its shape in numbers, and its ``{i}``. Fillings ask for none.

    ``dims`` gives the symbols their numbers (a number stands for itself); ``count`` is how many
    values ``{i}`` takes, from 0.
    """
    keys = {}
    for rule in rules:
        if rule.value is None:
            for i in range(count) if "{i}" in rule.source else (0,):
                keys[rule.source.format(i=i)] = (rule, _numbers(rule, dims), str(i))
    return keys


def _numbers(rule: Rule, dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(s) if s.isdigit() else dims[s] for s in rule.shape)


def apply(
    rules: Iterable[Rule],
    tensors: Mapping[str, SourceTensor],
    dims: Mapping[str, int],
    count: int,
    where: str,
    known_problems: Iterable[str] = (),
    called: Mapping[str, str] | None = None,
) -> dict[str, SourceTensor]:
    """The targets by name, in the order of the rules. ``known_problems`` are listed with those found here.

    ``called`` gives the names that ``tensors`` have in their file, for messages, where they are others.

    Raises:
        MappingError: source keys that are missing, that no rule knows, or whose shape is another.
    """
    rules, called = tuple(rules), called or {}
    expected = expand(rules, dims, count)
    problems = [*known_problems]
    problems += [f"missing: {key} {list(shape)}" for key, (_, shape, _) in expected.items() if key not in tensors]
    problems += [
        f"unexpected: {called.get(key, key)} {list(tensors[key].info.shape)}" for key in tensors if key not in expected
    ]
    targets: dict[str, SourceTensor] = {}
    for key, (rule, shape, i) in expected.items():
        if key not in tensors:
            continue
        tensor = tensors[key]
        if tensor.info.shape != shape:
            problems.append(f"misshaped: {called.get(key, key)} is {list(tensor.info.shape)}, not {list(shape)}")
            continue
        rows = shape[0] // len(rule.targets) if shape else 0
        for n, target in enumerate(rule.targets):
            name = target.format(i=i)
            if name in targets:
                raise ValueError(f"two rules make {name}")  # a mistake in a family, not in a checkpoint
            targets[name] = tensor if len(rule.targets) == 1 else tensor.rows(n * rows, (n + 1) * rows)
    dtypes = {tensor.info.dtype for tensor in targets.values()}
    if len(dtypes) > 1:
        problems.append(f"mixed dtypes: {', '.join(sorted(dtypes))}; a model has one")
    if problems:
        raise MappingError(f"{where} does not fit ({len(problems)} problems):", problems)
    return targets


def fillings(rules: Iterable[Rule], dims: Mapping[str, int], count: int, dtype: str) -> dict[str, SourceTensor]:
    """The targets that no source has, by name."""
    return {
        target.format(i=i): filled(rule.value, TensorInfo(dtype, _numbers(rule, dims)))
        for rule in rules
        if rule.value is not None
        for target in rule.targets
        for i in (range(count) if "{i}" in target else (0,))
    }


def count_of(pattern: str, names: Iterable[str]) -> int:
    """How many values from 0 on ``{i}`` of ``pattern`` takes among ``names``; gaps count."""
    regex = re.compile(re.escape(pattern).replace(r"\{i\}", "(0|[1-9][0-9]{0,5})"))
    found = [int(match[1]) for name in names if (match := regex.fullmatch(name))]
    # One stray huge number is an unexpected key, not the reason to miss thousands.
    return next((top + 1 for top in sorted(found, reverse=True) if top < 2 * len(found)), 0)
