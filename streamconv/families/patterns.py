"""Patterns of names, such as ``blocks.{i}.norm.weight``, and the names that they match.

An index in braces matches a number from 0 on between two dots. How many values it takes comes from the checkpoint, and
a hostile one can claim many more than it has. So the value of a name is made when it is looked up or listed, and
nothing is stored for each number.
"""

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations, groupby, islice, product
from math import prod
from typing import Generic, TypeVar

T = TypeVar("T")
Indexes = Mapping[str, int]
"""The value of each index, or the number of values that it takes, by the name of the index."""

_INDEX = re.compile(r"\{([a-z]+)\}")
_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,5})(?![^.])")
_MAX_NUMBERS = 4  # in a name that is looked up, which may match a pattern in 2 ** 4 ways


@lru_cache(maxsize=4096)
def indexes_of(*patterns: str) -> tuple[str, ...]:
    """Return the indexes of patterns, each once."""
    return tuple(dict.fromkeys(index for pattern in patterns for index in _INDEX.findall(pattern)))


def substitute_indexes(pattern: str, values: Indexes) -> str:
    """Return a pattern with numbers in place of its indexes; indexes without a value stay."""
    for index, value in values.items():
        pattern = pattern.replace(f"{{{index}}}", str(value))
    return pattern


def all_values(indexes: Sequence[str], counts: Indexes) -> Iterator[dict[str, int]]:
    """Yield every combination of values of some indexes; the last index changes fastest."""
    for values in product(*(range(counts.get(index, 0)) for index in indexes)):
        yield dict(zip(indexes, values, strict=True))


def count_of(pattern: str, names: Iterable[str]) -> int:
    """Count the values from 0 on that the index of ``pattern`` takes among ``names``; gaps are counted too."""
    regex = re.compile(re.sub(r"\\{[a-z]+\\}", "(0|[1-9][0-9]{0,5})", re.escape(pattern)))
    found = [int(match[1]) for name in names if (match := regex.fullmatch(name))]
    # One stray huge number is an unexpected key, not the reason to miss thousands.
    return next((top + 1 for top in sorted(found, reverse=True) if top < 2 * len(found)), 0)


class Patterns(Generic[T]):
    """Finds the patterns that a name matches, with the value of each. Any numbers match."""

    def __init__(self, patterns: Iterable[tuple[str, T]]):
        self._found: dict[str, list[tuple[tuple[str, ...], T]]] = {}  # by the pattern without names of indexes
        for pattern, value in patterns:
            self._found.setdefault(_INDEX.sub("{}", pattern), []).append((tuple(_INDEX.findall(pattern)), value))

    def find(self, name: str) -> Iterator[tuple[T, dict[str, int]]]:
        """Yield the value of each pattern that ``name`` matches, with the values of the pattern's indexes."""
        if "{" in name:
            return
        numbers = [*islice(_NUMBER.finditer(name), _MAX_NUMBERS)]
        for count in range(len(numbers) + 1):
            for chosen in combinations(numbers, count):
                for indexes, value in self._found.get(_without(name, chosen), ()):
                    yield value, dict(zip(indexes, (int(number[0]) for number in chosen), strict=True))

    def __contains__(self, name: str) -> bool:
        return next(self.find(name), None) is not None


def _without(name: str, numbers: Sequence[re.Match[str]]) -> str:
    """Return a name with ``{}`` in place of some of its numbers."""
    for number in reversed(numbers):
        name = f"{name[: number.start()]}{{}}{name[number.end() :]}"
    return name


class ExpandedNames(Mapping[str, T]):
    """Maps every name of ``patterns`` to its value, which the pattern's function makes from the values of its indexes.

    ``counts`` is how many values each index takes. Consecutive patterns with the same first index form a block: all
    names of block 0 come first, as in a model's own state dict.
    """

    def __init__(self, patterns: Mapping[str, Callable[[Indexes], T]], counts: Indexes):
        self.patterns, self._counts = patterns, counts
        self._plain = {name: value for name, value in patterns.items() if "{" not in name}
        self._found = Patterns((name, value) for name, value in patterns.items() if "{" in name)

    def __len__(self) -> int:
        return sum(prod(self._counts.get(index, 0) for index in indexes_of(name)) for name in self.patterns)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _, _ in self.expanded())

    def items(self) -> "ItemsView[str, T]":
        return _Items(self)

    def expanded(self) -> Iterator[tuple[str, str, Indexes]]:
        """Yield each name with its pattern and the values of its indexes."""
        return _expanded([(name, name) for name in self.patterns], {}, self._counts)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __getitem__(self, name: str) -> T:
        found = self._find(name)
        if found is None:
            raise KeyError(name)
        value, indexes = found
        return value(indexes)

    def _find(self, name: str) -> tuple[Callable[[Indexes], T], Indexes] | None:
        if (plain := self._plain.get(name)) is not None:
            return plain, {}
        for value, indexes in self._found.find(name):
            if all(number < self._counts.get(index, 0) for index, number in indexes.items()):
                return value, indexes
        return None


class _Items(ItemsView[str, T]):
    """The names and their values, without looking up each name."""

    _mapping: ExpandedNames[T]

    def __iter__(self) -> Iterator[tuple[str, T]]:
        names = self._mapping
        return ((name, names.patterns[pattern](values)) for name, pattern, values in names.expanded())


def _expanded(
    patterns: Sequence[tuple[str, str]], values: Indexes, counts: Indexes
) -> Iterator[tuple[str, str, Indexes]]:
    """Expand pairs of a name, in which the indexes of ``values`` are replaced already, and its pattern."""
    for index, group in groupby(patterns, lambda each: next(iter(indexes_of(each[0])), None)):
        if index is None:
            yield from ((name, pattern, values) for name, pattern in group)
            continue
        block = [*group]
        for i in range(counts.get(index, 0)):
            inner = [(substitute_indexes(name, {index: i}), pattern) for name, pattern in block]
            yield from _expanded(inner, {**values, index: i}, counts)
