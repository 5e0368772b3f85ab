"""TODO verification.result"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Check:
    """One rung's verdict. ``passed`` is None where it did not run, and ``proves`` then says why not.

    ``not_checked`` is what a rung that ran usually proves, and this time did not.
    """

    name: str
    passed: bool | None
    proves: str
    problems: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    not_checked: str = ""

    def since(self, start: float) -> "Check":
        """With the seconds that it took."""
        return replace(self, numbers={**self.numbers, "seconds": time.monotonic() - start})


@dataclass(frozen=True)
class Verification:
    """What a verification of an output against ``source`` found.

    Without a source, ``source`` is what the output's manifest names, and no model ran: there is no
    ``device``, no ``reference`` and no ``memory``. ``reference`` is what the original was run by;
    ``output`` names the model and its files with their sizes and sha256; ``predictions`` are a
    classifier's best labels for the image, with their shares; ``memory`` is `devices.MemoryWatch`'s,
    in bytes; ``pictures`` are PNGs as data addresses: the "image" that both models saw, and the patch
    features of the "original" and the "converted" one.
    """

    checks: tuple[Check, ...]
    device: str | None
    reference: str | None
    versions: Mapping[str, str]
    source: Mapping[str, Mapping[str, object]]
    output: Mapping[str, Any]
    memory: Mapping[str, int | None]
    seconds: float
    predictions: tuple[tuple[str, float], ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    not_recorded: str = ""

    @property
    def passed(self) -> bool:
        """Whether every rung that ran passed, and one did."""
        ran = [check.passed for check in self.checks if check.passed is not None]
        return bool(ran) and all(ran)

    def as_record(self) -> dict[str, Any]:
        """For the manifest, which stays a text to read: `as_dict` without the pictures."""
        return {**self.as_dict(), "pictures": {}}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields and ``passed``."""
        return {"passed": self.passed, **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    """JSON has no infinity: as a word."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
