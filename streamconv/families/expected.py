"""Expands patterns such as ``blocks.{i}.norm.weight`` to the names of all blocks.

The number of blocks comes from the checkpoint, and a hostile one can claim many more than it has. So a name's value is
made when it is looked up or listed, and nothing is stored for each block.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import TypeVar

T = TypeVar("T")
_NUMBER = "{i}"


def numbered(pattern: str, i: int) -> str:
    """Return the name of block ``i``."""
    return pattern.replace(_NUMBER, str(i))


class ExpandedNames(Mapping[str, T]):
    """Maps every name of ``patterns`` to its value, which the pattern's function makes from the block's number.

    ``{i}`` may occur once in a pattern, as a dot-free part; ``count`` is how many values it takes, from 0. Consecutive
    patterns with ``{i}`` form a block: all names of block 0 come first, as in a model's own state dict.
    """

    def __init__(self, patterns: Mapping[str, Callable[[int], T]], count: int):
        self._count = count
        self._groups = [(is_block, [*each]) for is_block, each in groupby(patterns, lambda name: _NUMBER in name)]
        self._plain = {name: value for name, value in patterns.items() if _NUMBER not in name}
        self._in_block: dict[str, dict[str, Callable[[int], T]]] = {}  # by what is before and after the number
        for name, value in patterns.items():
            before, is_block, after = name.partition(_NUMBER)
            if is_block:
                self._in_block.setdefault(before, {})[after] = value

    def __len__(self) -> int:
        return sum(len(names) * (self._count if is_block else 1) for is_block, names in self._groups)

    def __iter__(self) -> Iterator[str]:
        for is_block, names in self._groups:
            for i in range(self._count if is_block else 1):
                yield from (numbered(name, i) for name in names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __getitem__(self, name: str) -> T:
        found = self._find(name)
        if found is None:
            raise KeyError(name)
        value, i = found
        return value(i)

    def _find(self, name: str) -> tuple[Callable[[int], T], int] | None:
        if (plain := self._plain.get(name)) is not None:
            return plain, 0
        for before, values in self._in_block.items():
            if name.startswith(before):
                number, dot, after = name[len(before) :].partition(".")
                if (value := values.get(dot + after)) is not None and self._is_number(number):
                    return value, int(number)
        return None

    def _is_number(self, text: str) -> bool:
        """Return whether this is the number of a block, spelled without leading zeros."""
        return (
            len(text) <= len(str(self._count))
            and text.isdecimal()
            and str(int(text)) == text
            and (int(text) < self._count)
        )
