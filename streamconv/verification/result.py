"""The result of a verification: plain data, free of torch."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from streamconv.output.manifest import SourceFile


@dataclass(frozen=True)
class Check:
    """The result of one check. ``passed`` is None if it did not run; then ``proves`` gives the reason.

    ``not_checked`` describes what the check usually covers but did not cover this time.
    """

    name: str
    passed: bool | None
    proves: str
    problems: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    not_checked: str = ""

    def since(self, start: float) -> "Check":
        """Return the check with the seconds that it took since ``start``, a time of `time.monotonic`."""
        return replace(self, numbers={**self.numbers, "seconds": time.monotonic() - start})


@dataclass(frozen=True)
class CastCost:
    """How far a cast output is from the original with its weights as stored, in the outputs of the last layer.

    Attributes:
        dtype: torch's name of the dtype that ``from_pretrained`` computes in by default.
        largest: The largest absolute difference in that dtype.
        largest_in_float32: The same if the converted model computes in float32.
        magnitude: The original's largest absolute value.
    """

    dtype: str
    largest: float
    largest_in_float32: float
    magnitude: float


@dataclass(frozen=True)
class ModelResults:
    """The models' part of a `Verification`, whose fields have the same names."""

    checks: tuple[Check, ...]
    memory: Mapping[str, int | None] = field(default_factory=dict)
    predictions: tuple[tuple[str, float], ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    cast_cost: CastCost | None = None
    device: str = ""
    reference: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """The result of verifying an output against ``source``.

    If no source was given, ``source`` is the one that the output's manifest names, and no model ran: ``device`` and
    ``reference`` are None, and ``memory`` is empty. ``reference`` names the code of the original model. ``output``
    names the model and its files with their sizes and sha256. ``predictions`` are a classifier's best labels for the
    image, with their probabilities. ``memory`` is from `devices.MemoryWatch`, in bytes. It is that of the process in
    which the models ran and torch is imported. If the job started that process, the calling process's own memory, about
    50 MB whatever the size of the model, comes on top. ``pictures`` are PNGs as data URLs: the "image" that both models
    saw, and the patch features of the "original" and the "converted" model.
    ``not_recorded`` is the reason if the result could not be recorded in the output's manifest. ``cast_cost`` is None
    if nothing was cast or no model ran.
    """

    checks: tuple[Check, ...]
    device: str | None
    reference: str | None
    versions: Mapping[str, str]
    source: Mapping[str, SourceFile]
    output: Mapping[str, Any]
    memory: Mapping[str, int | None]
    seconds: float
    predictions: tuple[tuple[str, float], ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict, repr=False)
    not_recorded: str = ""
    cast_cost: CastCost | None = None

    def check(self, name: str) -> Check:
        """Return the check called ``name``, such as "parity".

        Raises:
            KeyError: there is none.
        """
        return {check.name: check for check in self.checks}[name]

    @property
    def passed(self) -> bool:
        """True if at least one check ran, and every check that ran passed."""
        ran = [check.passed for check in self.checks if check.passed is not None]
        return bool(ran) and all(ran)

    def as_record(self) -> dict[str, Any]:
        """Return `as_dict` without the pictures, for the manifest, which people read as text."""
        return {**self.as_dict(), "pictures": {}}

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and ``passed`` for JSON."""
        return {"passed": self.passed, **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    """Replace infinities and NaNs, which JSON does not have, with strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
