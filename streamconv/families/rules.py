"""Rules that turn source tensors into target tensors: data, matched on whole keys.

A pattern's ``{i}`` stands for one dot-free part of a key. Every source key matches exactly one
rule and every target is made exactly once; whatever breaks that is an error that lists it all.
A rule also carries the source's shape in symbols, so that it says what a checkpoint must hold.
Read from right to left, the same rules turn targets into sources.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from streamconv.errors import MappingError
from streamconv.tensors.expressions import AnyTensor, Joined, SourceTensor, joined


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
    values ``{i}`` takes, from 0. Rules with ``{i}`` that follow one another are a block: the keys of
    block 0 come first, as in a model's own state dict.
    """
    keys = {}
    asked = (rule for rule in rules if rule.value is None)
    for is_block, group in groupby(asked, key=lambda rule: "{i}" in rule.source):
        block = [(rule, _numbers(rule, dims)) for rule in group]
        for i in range(count if is_block else 1):
            for rule, shape in block:
                keys[rule.source.format(i=i)] = (rule, shape, str(i))
    return keys


def _numbers(rule: Rule, dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(s) if s.isdigit() else dims[s] for s in rule.shape)


def map_tensors(
    rules: Iterable[Rule],
    tensors: Mapping[str, AnyTensor],
    dims: Mapping[str, int],
    count: int,
    where: str,
    known_problems: Iterable[str] = (),
    called: Mapping[str, str] | None = None,
    is_cast: bool = False,
) -> dict[str, SourceTensor]:
    """The targets by name, in the order of the rules. ``known_problems`` are listed with those found here.

    ``called`` gives the names that ``tensors`` have in their file, for messages, where they are others. Tensors of
    several dtypes are no problem where all will be cast to one.

    Raises:
        MappingError: source keys that are missing, that no rule knows, or whose shape is another.
    """
    expected = expand(rules, dims, count)
    shapes = {key: shape for key, (_, shape, _) in expected.items()}
    one_dtype = None if is_cast else "a model has one (--dtype)"
    _require_fit(tensors, shapes, where, known_problems, called or {}, one_dtype)
    targets: dict[str, SourceTensor] = {}
    for key, (rule, shape, i) in expected.items():
        tensor = tensors[key]
        rows = shape[0] // len(rule.targets) if shape else 0
        for n, target in enumerate(rule.targets):
            name = target.format(i=i)
            if name in targets:
                raise ValueError(f"two rules make {name}")  # a mistake in a family, not in a checkpoint
            if len(rule.targets) > 1 or isinstance(tensor, Joined):
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
    """`map_tensors`, backwards: of ``tensors``, the targets, the sources by key, in the order of `expand`.

    Raises:
        MappingError: targets that are missing, that no rule makes, or whose shape is another.
    """
    keys = expand(rules, dims, count)
    parts = {key: [target.format(i=i) for target in rule.targets] for key, (rule, _, i) in keys.items()}
    expected = {name: _part(shape, len(parts[key])) for key, (_, shape, _) in keys.items() for name in parts[key]}
    _require_fit(tensors, expected, where, known_problems, {})
    return {key: joined([tensors[name] for name in names]) for key, names in parts.items()}


def _part(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Of a tensor of ``shape`` that is cut into ``count`` equal parts."""
    return (*(n // count for n in shape[:1]), *shape[1:])


def _require_fit(
    tensors: Mapping[str, AnyTensor],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    known_problems: Iterable[str],
    called: Mapping[str, str],
    one_dtype: str | None = "a model has one",
) -> None:
    shapes = {name: tensor.info.shape for name, tensor in tensors.items()}
    problems = [*known_problems]
    problems += [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in shapes]
    problems += [
        f"unexpected: {called.get(name, name)} {list(shape)}" for name, shape in shapes.items() if name not in expected
    ]
    problems += [
        f"misshaped: {called.get(name, name)} is {list(shapes[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    dtypes = {tensor.info.dtype for name, tensor in tensors.items() if name in expected}
    if len(dtypes) > 1 and one_dtype is not None:
        problems.append(f"mixed dtypes: {', '.join(sorted(dtypes))}; {one_dtype}")
    if problems:
        raise MappingError(f"{where} does not fit ({len(problems)} problems):", problems)


def constants(rules: Iterable[Rule], dims: Mapping[str, int], count: int) -> dict[str, tuple[float, tuple[int, ...]]]:
    """The targets that no source has, by name: their values and shapes."""
    return {
        target.format(i=i): (rule.value, _numbers(rule, dims))
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
