"""The text output of the commands: one function per kind of result, each yielding lines to print."""

from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.families.registry import all_families
from streamconv.jobs.convert import Conversion
from streamconv.jobs.revert import Reverted
from streamconv.planning.plan import Plan
from streamconv.verification.result import Check, Verification

VERDICTS = {True: "ok", False: "FAILED:", None: "not run:"}
INDENT = " " * 23  # the column where the text of a check begins


def conversion_lines(done: Conversion) -> Iterator[str]:
    state = "was already converted; nothing was changed" if done.was_finished else "converted"
    resumed = (
        f" ({done.resumed_bytes:,} of them before an interruption)"
        if done.resumed_bytes and not done.was_finished
        else ""
    )
    where = f"in {done.output}" if done.sent_to is None else f"uploaded to {done.sent_to}, one file at a time"
    yield f"{done.plan.title}: {state}, {done.plan.weights:,} bytes of weights{resumed} {where}"
    for name, digest in done.shards.items():
        yield f"  {name}  sha256 {digest}{' as recorded' if done.was_finished else ''}"
    if done.plan.cast:
        yield "  cast from {from} to {to}".format_map(done.plan.cast)
    if done.overflow_count:
        dtype = done.plan.config["dtype"]
        yield f"  {done.overflow_count:,} finite values are outside the range of {dtype} and are now infinite"
    if not done.is_crc_checked:
        yield "  the source has no CRC-32s, so its bytes could not be checked for damage"
    yield from (f"  {line}" for line in _plan_notes(done.plan))
    if done.labels_from:
        yield f"  labels from {done.labels_from}"


def reverted_lines(done: Reverted) -> Iterator[str]:
    resumed = f" ({done.resumed_bytes:,} of them before an interruption)" if done.resumed_bytes else ""
    yield f"{done.title}: reverted, {done.weights:,} bytes of weights{resumed} in {' and '.join(map(str, done.files))}"
    yield from (f"  {path.name}  sha256 {file.sha256}" for path, file in done.written.items())
    yield "  the folder's files were not verified first; `streamconv verify DIR` does that if it has a streamconv.json"


def plan_lines(plan: Plan) -> Iterator[str]:
    width = max(len(move.source) for move in plan.mapping)
    for move in plan.mapping:
        yield f"{move.source:{width}}  {move.info!s:24}  -> {', '.join(move.targets)}"
    yield ""
    for shard in plan.shards:
        yield f"{shard.filename}  {len(shard.tensors)} tensors, {shard.size:,} bytes"
    if plan.cast:
        yield "cast from {from} to {to}".format_map(plan.cast)
    yield from _plan_notes(plan)
    yield f"{plan.title}: {plan.parameters:,} parameters, {plan.size:,} bytes to write"


def _plan_notes(plan: Plan) -> Iterator[str]:
    yield from plan.notes
    yield from (f"skipped: {each}" for each in plan.skipped)


def model_lines() -> Iterator[str]:
    rows = [("model", "published as", "weights", "files")]
    for family in all_families():
        for model in family.models:
            files = " + ".join(file.filename for file in (model.backbone, model.head) if file)
            weights = sum(info.nbytes for info in family.sources(model.dimensions).values())
            rows.append((model.name, model.published_name, f"{weights / 1e6:,.0f} MB", files))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, published, size, file_names in rows:
        yield f"{name:{widths[0]}}  {published:{widths[1]}}  {size:>{widths[2]}}  {file_names}"


def verification_lines(verification: Verification) -> Iterator[str]:
    has_source = verification.device is not None
    for check in verification.checks:
        yield f"{check.name:14}{VERDICTS[check.passed]:9}{check.proves}"
        details = [*_number_lines(check, verification.device), *check.problems, check.not_checked]
        yield from (INDENT + line for line in details if line)
    if verification.predictions:
        yield "Predicted classes:"
        for label, probability in verification.predictions:
            yield f"  {probability:6.1%}  {label}"
    yield ", ".join(_cost(verification.memory, verification.seconds))
    gaps = [f"{check.name} did not run" if check.passed is None else check.not_checked for check in verification.checks]
    if not verification.passed:
        yield f"The output differs from {'its source' if has_source else 'what was written'}. Do not use it."
    elif not has_source or not any(gaps):
        yield "Looks ok!"
    else:
        yield f"Looks ok, but not everything was checked: {'; '.join(filter(None, gaps))}."


def _number_lines(check: Check, device: str | None) -> Iterator[str]:
    numbers = check.numbers
    if check.name == "parity" and "largest" in numbers:
        largest = f"largest difference {numbers['largest']:.3g}, allowed {numbers['tolerance']:g}"
        yield f"{len(numbers['differences'])} layer outputs on {device}: {largest}"
    if check.name == "preprocessing" and numbers.get("pil") is not None and numbers.get("default") is not None:
        default = f"by {numbers['default']:.3g} with transformers' default, {numbers['default_backend']}"
        grey_level = f"one grey level is {numbers['grey_level']:.3g}"
        yield f"pixels differ by {numbers['pil']:.3g} with Pillow, {default} ({grey_level})"
    if check.name == "preprocessing" and numbers.get("as_published"):
        yield (
            f"outputs differ by {_join(numbers['as_published'])}, because Meta interpolates positions by the factor "
            "(n + 0.1) / N (from N patches per side to n) and transformers by n / N; with the same interpolation they "
            f"differ by {_join(numbers['same_interpolation'])}"
        )


def _join(differences: Mapping[str, Any]) -> str:
    return ", ".join(f"{difference:.3g} ({name})" for name, difference in differences.items())


def _cost(memory: Mapping[str, int | None], seconds: float) -> Iterator[str]:
    yield f"{seconds:.1f} s"
    if (peak := memory.get("host_anonymous_peak")) and (start := memory.get("host_anonymous_start")):
        yield f"{peak / 1e6:,.0f} MB peak memory, {start / 1e6:,.0f} MB of it from importing torch and transformers"
    if (gpu_peak := memory.get("gpu_peak")) is not None:
        yield f"{gpu_peak / 1e6:,.0f} MB peak GPU memory"
