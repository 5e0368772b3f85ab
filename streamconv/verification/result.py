"""The result of a verification as plain data, without torch, and the sentences that state it."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from streamconv.output.manifest import SourceFile


@dataclass(frozen=True)
class Check:
    """The result of one check. ``passed`` is None if it did not run; then ``proves`` gives the reason.

    ``proves`` is proved only if the check passed: see `finding`. ``not_checked`` describes what the check usually
    covers but did not cover this time.
    """

    name: str
    passed: bool | None
    proves: str
    problems: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    not_checked: str = ""

    @property
    def finding(self) -> str:
        """The claim that was proved, the failure, or the reason why the check did not run."""
        return _failure(self) if self.passed is False else self.proves

    def since(self, start: float) -> "Check":
        """Return the check with the seconds that it took since ``start``, a time of `time.monotonic`."""
        return replace(self, numbers={**self.numbers, "seconds": time.monotonic() - start})


@dataclass(frozen=True)
class CastCost:
    """The differences between a cast output and the uncast original, in the outputs of the last layer.

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

    def sentence(self, stored: str) -> str:
        """Describe the cost; ``stored`` is the name of the original's dtype."""
        differ = f"outputs differ from the {stored} original's by {_by(self.largest)}"
        in_float32 = "" if self.dtype == "float32" else f" (in float32, by {_by(self.largest_in_float32)})"
        return (
            f"Cost of the cast: in {self.dtype}, from_pretrained's default, {differ}{in_float32}. "
            f"The original's largest output value is {self.magnitude:.2g}."
        )


@dataclass(frozen=True)
class Conclusion:
    """The verdict of a verification.

    ``kind`` is "passed", "incomplete" (what ran passed, but not everything ran) or "failed". ``title`` is the verdict;
    ``details`` name the failed checks, or what was not checked; ``cast_cost`` is a sentence. The last two may be empty.
    """

    kind: str
    title: str
    details: str = ""
    cast_cost: str = ""


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
    gpu: Mapping[str, Any] = field(default_factory=dict)
    device_note: str = ""


@dataclass(frozen=True)
class Verification:
    """The result of verifying an output against ``source``.

    If no source was given, ``source`` is the one that the output's manifest names. Then, and for an output in a store,
    no model ran: ``device`` and ``reference`` are None, and ``memory`` is empty. ``reference`` names the code of the
    original model. ``output`` names the model, its dtype, and its files with their sizes and sha256. ``predictions``
    are a classifier's best labels for the image, with their probabilities. ``memory`` is from `memory.MemoryWatch`, in
    bytes. It is that of the process in which the models ran and torch is imported. If the job started that process, the
    calling process's own memory, about 50 MB whatever the size of the model, comes on top. ``pictures`` are PNGs as
    data URLs: the "image" that both models saw, and the patch features of the "original" and the "converted" model.
    ``not_recorded`` is the reason if the result could not be recorded in the output's manifest. ``cast_cost`` is None
    if nothing was cast or no model ran. ``gpu`` has the name, compute capability, memory in bytes, driver and runtime
    of the GPU that the models ran on, if they did. ``device_note`` is why a GPU was not used, if "auto" found one that
    does not work. ``date`` is the end in UTC, in ISO 8601. ``command`` is the command line, without secrets in URLs;
    empty if a program called the library. ``edited`` are the small files that were changed after the conversion: see
    the config check for the values.
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
    gpu: Mapping[str, Any] = field(default_factory=dict)
    device_note: str = ""
    date: str = ""
    command: str = ""
    edited: tuple[str, ...] = ()

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

    @property
    def conclusion(self) -> Conclusion:
        """The verdict, in words."""
        has_source, cost = all(check.name != "files" for check in self.checks), self.cast_cost
        failed = [check.name for check in self.checks if check.passed is False]
        if not self.passed and not failed:
            return Conclusion("incomplete", "Nothing was checked.")
        if failed:
            title = "Do not use this output." if has_source else "Do not use these files."
            details = f"Failed: {', '.join(failed)}."
            if self.edited and not has_source:
                names, them = " and ".join(self.edited), "it" if len(self.edited) == 1 else "them"
                details += (
                    f" If you edited {names} yourself, verify {them} against the source, which records the change: "
                    "`streamconv verify DIR SOURCE`."
                )
            return Conclusion("failed", title, details)
        if not has_source:
            since = f"verified ({', '.join(self.edited)} had been edited)" if self.edited else "written"
            return Conclusion("incomplete", f"Files unchanged since they were {since}; not compared with a source.")
        costs = cost.sentence((self.output.get("cast") or {}).get("from", "uncast")) if cost is not None else ""
        gaps = [
            check.not_checked or (f"the {check.name} check did not run" if check.passed is None else "")
            for check in self.checks
        ]
        if self.output.get("cast") and cost is None:
            gaps.append("the cost of the cast was not measured")
        if not any(gaps):
            return Conclusion("passed", "Looks ok!", cast_cost=costs)
        is_float32_only = any("float32_only" in check.numbers for check in self.checks)
        title = f"Looks ok{' (float32 only)' if is_float32_only else ''}, but not everything was checked:"
        return Conclusion("incomplete", title, f"{'; '.join(dict.fromkeys(filter(None, gaps)))}.", costs)

    def as_record(self) -> dict[str, Any]:
        """Return `as_dict` for the manifest: without pictures, since people read it as text, and without the command.

        The manifest may be published, and a command names folders of the user's machine.
        """
        return {**self.as_dict(), "pictures": {}, "command": ""}

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with ``passed``, the ``conclusion`` and each check's ``finding``."""
        fields = asdict(self)
        for check, found in zip(self.checks, fields["checks"], strict=True):
            found["finding"] = check.finding
        found = _finite({"passed": self.passed, "conclusion": asdict(self.conclusion), **fields})
        return dict(found)


def _by(difference: float) -> str:
    return f"up to {difference:.2g}" if math.isfinite(difference) else "infinity or NaN"


def _failure(check: Check) -> str:
    """Describe what failed: ``proves`` would read like a claim."""
    numbers = check.numbers
    if check.name == "bytes" and (wrong := numbers.get("wrong")):
        verb = "does not match its" if wrong == 1 else "do not match their"
        return f"{wrong:,} of {numbers['tensors']:,} tensors {verb} source"
    if check.name in ("parity", "native") and (differences := numbers.get("differences")):
        differing = sum(not difference <= numbers["tolerance"] for difference in differences.values())
        if not differing:
            return "the two models do not have the same layers"
        at = f" at {numbers['size']}x{numbers['size']}" if "size" in numbers else ""
        return f"{differing} of {len(differences)} layer outputs differ{at}"
    return FAILURES.get(check.name, "the check failed")


FAILURES = {
    "files": "files are missing, or differ from what was written",
    "bytes": "weight files or checksums are not as expected",
    "config": "values in config.json or another small file are not as planned",
    "load": "transformers does not load the model correctly",
    "parity": "the models could not be compared",
    "native": "the models could not be compared",
    "preprocessing": "the saved image processor does not produce the pixels that it should",
}


def _finite(value: Any) -> Any:
    """Replace infinities and NaNs, which JSON does not have, with strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
