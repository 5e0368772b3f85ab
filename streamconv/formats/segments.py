"""A file that is to be written, as segments in order: bytes, tensors, and bytes that depend on the tensors' CRC-32s."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LateBytes:
    """``size`` bytes that depend on the tensors before them: ``make`` returns them from the CRC-32s by name."""

    size: int
    make: Callable[[Mapping[str, int]], bytes]


Segment = bytes | str | LateBytes
"""A string is the name of a tensor, and stands for its row-major bytes."""
