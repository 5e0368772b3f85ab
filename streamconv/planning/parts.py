"""Divides the weight files of a plan into parts, which can be written by different processes or machines."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.arguments import shown_value
from streamconv.errors import UsageError
from streamconv.planning.shards import MAX_SHARDS, Shard


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a plan's weight files: number ``number``, from 1 on, of ``count`` parts.

    Raises:
        UsageError: there is no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not all(type(each) is int for each in (self.number, self.count)):
            raise UsageError(f"{shown_value((self.number, self.count))} is not a part. Give two ints, as 3 and 16.")
        if not 1 <= self.number <= self.count <= MAX_SHARDS:
            raise UsageError(
                f"{self.number}/{self.count} is not a part. Write it as 3/16, for the third of sixteen parts; the "
                f"first is 1/16, and the last 16/16. There are at most {MAX_SHARDS:,}."
            )

    @classmethod
    def parse(cls, text: "str | Part") -> "Part":
        """Parse a part such as "3/16".

        Raises:
            UsageError: it is not one.
        """
        if isinstance(text, Part):
            return text
        match = re.fullmatch(r"0*([0-9]{1,9})/0*([0-9]{1,9})", text.strip(), re.ASCII)
        if match is None:
            raise UsageError(f"{shown_value(text)} is not a part. Write it as 3/16, for the third of sixteen parts.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def shards_of(shards: Sequence[Shard], part: Part) -> tuple[Shard, ...]:
    """Return the files of a part, in the plan's order. Each file belongs to one part; some parts may have none.

    The largest files are assigned first, each to the part that has the fewest bytes so far.
    """
    sizes = [0] * part.count
    chosen = []
    for i in sorted(range(len(shards)), key=lambda i: -shards[i].size):
        least = min(range(part.count), key=sizes.__getitem__)
        sizes[least] += shards[i].size
        if least == part.number - 1:
            chosen.append(i)
    return tuple(shards[i] for i in sorted(chosen))
