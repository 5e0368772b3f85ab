"""The section of a model card about the verification that the folder's manifest records."""

from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.errors import OutputError
from streamconv.hub.markdown import as_text
from streamconv.output.manifest import MANIFEST_NAME, Manifest

NOT_REPEATED = f"**As recorded in {MANIFEST_NAME}.** The verification was not repeated before this was published."
VERDICTS = {True: "passed", False: "**FAILED**", None: "not run"}


def verification_section(manifest: Manifest, *, was_verified_here: bool) -> list[str]:
    """Return the paragraphs about the verdict that a manifest records, which may be another machine's.

    Raises:
        OutputError: the record is damaged: another version or another program may have written it.
    """
    note = [NOT_REPEATED] if manifest.verification and not was_verified_here else []
    try:
        return [*note, "\n".join(_lines(manifest.verification or {}))]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise OutputError(
            f"{MANIFEST_NAME} is damaged: its field verification is not the record of a verification ({error}). "
            "Verify the folder against its source, which records it again."
        ) from error


def _lines(verification: Mapping[str, Any]) -> Iterator[str]:
    if not verification:
        yield "No check was run."
        return
    yield "| check | result | finding |"
    yield "|---|---|---|"
    for check in verification.get("checks") or ():
        result = VERDICTS[check["passed"] if isinstance(check.get("passed"), bool) else None]
        not_checked = check.get("not_checked")
        found = check.get("finding") or check.get("proves")
        text = f"{found}. But {not_checked}." if not_checked else found
        yield f"| {as_text(check.get('name'))} | {result} | {as_text(text)} |"
    for check in verification.get("checks") or ():
        numbers = check.get("numbers") or {}
        if "largest" in numbers:
            pixels = f" at {as_text(numbers['size'])}x{as_text(numbers['size'])}" if "size" in numbers else ""
            arithmetic = ", in a second pass in float64" if "float32" in numbers else ""
            largest, allowed = (float(numbers.get(key, "nan")) for key in ("largest", "tolerance"))
            yield f"\nLargest difference in any layer{pixels}{arithmetic}: {largest:.3g} (allowed: {allowed:g})."
        if check.get("passed") and (published := numbers.get("as_published")):
            found = ", ".join(f"{float(difference):.3g} ({as_text(name)})" for name, difference in published.items())
            known = numbers.get("known_difference") or {}
            changes = known.get("changes") or "the original's own arithmetic changes outputs"
            yield f"\nBy design, not an error: {as_text(changes)} by up to {found}."
    if cast_cost := (verification.get("conclusion") or {}).get("cast_cost"):
        yield f"\n{as_text(cast_cost)}"
    for problem in (problem for check in verification.get("checks") or () for problem in check.get("problems") or ()):
        yield f"\n- {as_text(problem)}"
    if verification.get("device"):
        versions = ", ".join(f"{name} {version}" for name, version in (verification.get("versions") or {}).items())
        date = str(verification.get("date") or "").replace("T", " ").replace("+00:00", " UTC")
        when = f", {as_text(date)}" if date else ""
        yield f"\nRun on {as_text(verification['device'])} with {as_text(versions)}{when}."
    if reference := verification.get("reference"):
        code = "streamconv's own" if reference == "builtin" else as_text(reference)
        yield f"Original model's code: {code}."
