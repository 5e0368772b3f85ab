"""The text output of a verification: the checks, what they found and cost, and the verdict."""

from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.cli.layout import Line, folded
from streamconv.cli.units import duration, size
from streamconv.display import printable
from streamconv.verification.result import Check, Verification

VERDICTS = {True: "ok", False: "FAILED", None: "not run:"}
GOOD, INCOMPLETE, BAD = "green", "yellow", "red"
COLOURS = {"passed": GOOD, "incomplete": INCOMPLETE, "failed": BAD}
INDENT = 23  # the column where the text of a check begins


def verification_lines(verification: Verification) -> Iterator[Line | str]:
    for check in verification.checks:
        colour = BAD if check.passed is False else INCOMPLETE if check.passed is None or check.not_checked else GOOD
        yield Line(f"{VERDICTS[check.passed]:9}", check.finding, colour=colour, label=f"{check.name:14}")
        numbers = [*_number_lines(check, verification.device), *_size_lines(check, verification)]
        details = [*folded(check.problems), *numbers, check.not_checked if check.passed is not None else ""]
        yield from (Line(" " * INDENT, line) for line in details if line)
    if verification.predictions:
        yield "Predicted classes:"
        for label, probability in verification.predictions:
            yield f"  {probability:6.1%}  {printable(label)}"
    yield ", ".join(_cost(verification.memory, verification.seconds))
    yield _verdict(verification)


def _verdict(verification: Verification) -> Line:
    conclusion = verification.conclusion
    text = "".join(f" {text}" for text in (conclusion.details, conclusion.cast_cost) if text)
    return Line(conclusion.title, text, hang=2, colour=COLOURS[conclusion.kind], is_bold=True)


def _number_lines(check: Check, device: str | None) -> Iterator[str]:
    numbers = check.numbers
    if check.name in ("parity", "native") and "largest" in numbers:
        largest = f"largest difference {numbers['largest']:.3g}, allowed {numbers['tolerance']:g}"
        second, first = "", ""
        if "float32" in numbers:
            second, first = ", second pass in float64", f"; first pass in float32: {numbers['float32']['largest']:.3g}"
        yield f"{len(numbers['differences'])} layer outputs on {device}{second}: {largest}{first}"
    if check.name == "preprocessing" and numbers.get("default") is not None:
        pillow = f"{numbers['pil']:.3g} with Pillow, " if numbers.get("pil") is not None else ""
        default = f"{numbers['default']:.3g} with transformers' default, {numbers['default_backend']}"
        yield f"largest difference {pillow}{default} (one grey level is {numbers['grey_level']:.3g})"
    if check.name == "preprocessing" and check.passed and numbers.get("rounded") is not None:
        yield f"by design, not an error: the original's rounding changes pixels by up to {numbers['rounded']:.3g}"


def _size_lines(check: Check, verification: Verification) -> Iterator[str]:
    """Explain the size at which the models ran, and the difference by design that it brings."""
    size, native = check.numbers.get("size"), check.numbers.get("native_size")
    if check.name == "parity" and check.passed and (cast := verification.output.get("cast")):
        yield f"torch cast the original's weights to {cast['to']}; both models computed in float32"
    if check.name != "parity" or check.passed is not True:
        return
    if (published := check.numbers.get("as_published")) and (own := check.numbers.get("known_difference")):
        yield (
            f"by design, not an error: {own['changes']} by up to {_join(published)}; for this check, {own['for_check']}"
        )
    if size is None or native is None or size == native:
        return
    is_thorough = any(each.name == "native" for each in verification.checks)
    more = "" if is_thorough else f"; --thorough adds the native size, {native}x{native}"
    yield f"{size}x{size} is the image processor's size{more}; the bytes check covers every position embedding"


def _join(differences: Mapping[str, Any]) -> str:
    return ", ".join(f"{difference:.3g} ({name})" for name, difference in differences.items())


def _cost(memory: Mapping[str, int | None], seconds: float) -> Iterator[str]:
    yield duration(seconds)
    if (peak := memory.get("host_anonymous_peak")) and (start := memory.get("host_anonymous_start")):
        imports = f"{size(start)} of it from importing torch and transformers"
        yield f"{size(peak)} peak memory without mapped files, {imports}"
    if (gpu_peak := memory.get("gpu_peak")) is not None:
        others = {"reserved": memory.get("gpu_reserved_peak"), "used by all processes": memory.get("gpu_used_peak")}
        more = ", ".join(f"{size(count)} {what}" for what, count in others.items() if count is not None)
        yield f"{size(gpu_peak)} peak GPU memory" + (f" ({more})" if more else "")
