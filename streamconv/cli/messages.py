"""What the command line says of results, as lines; it prints them."""

from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.families.registry import all_families
from streamconv.jobs.convert import Conversion
from streamconv.jobs.revert import Reverted
from streamconv.planning.plan import Plan
from streamconv.verification.result import Check, Verification

VERDICTS = {True: "ok", False: "FAILED", None: "not run"}
INDENT = " " * 22  # where a rung's text begins


def conversion_lines(done: Conversion) -> Iterator[str]:
    state = "was converted already and is left as it is" if done.was_finished else "converted"
    before = (
        f", {done.resumed_bytes:,} of them before an interruption"
        if done.resumed_bytes and not done.was_finished
        else ""
    )
    where = f"in {done.output}" if done.sent_to is None else f"sent to {done.sent_to}, a file at a time"
    yield f"{done.plan.title}: {state}, {done.plan.weights:,} bytes of weights{before} {where}"
    for name, digest in done.shards.items():
        yield f"  {name}  sha256 {digest}{' as recorded' if done.was_finished else ''}"
    if done.plan.cast:
        yield "  cast from {from} to {to}".format_map(done.plan.cast)
    if done.overflow_count:
        dtype = done.plan.config["dtype"]
        yield f"  {done.overflow_count:,} finite values are beyond the range of {dtype}, and infinite now"
    if not done.is_crc_checked:
        yield "  the source carries no CRC-32s, so that its bytes could not be checked for damage"
    yield from (f"  {line}" for line in _told(done.plan))
    if done.labels_from:
        yield f"  labels from {done.labels_from}"


def reverted_lines(done: Reverted) -> Iterator[str]:
    yield f"{done.title}: reverted, {done.weights:,} bytes of weights in {' and '.join(map(str, done.files))}"
    yield "  its bytes were believed: `streamconv verify DIR` checks a folder that has a streamconv.json"


def plan_lines(plan: Plan) -> Iterator[str]:
    width = max(len(move.source) for move in plan.mapping)
    for move in plan.mapping:
        yield f"{move.source:{width}}  {move.info!s:24}  -> {', '.join(move.targets)}"
    yield ""
    for shard in plan.shards:
        yield f"{shard.filename}  {len(shard.tensors)} tensors, {shard.size:,} bytes"
    if plan.cast:
        yield "cast from {from} to {to}".format_map(plan.cast)
    yield from _told(plan)
    yield f"{plan.title}: {plan.parameters:,} parameters, {plan.size:,} bytes to write"


def _told(plan: Plan) -> Iterator[str]:
    yield from plan.notes
    yield from (f"left out: {each}" for each in plan.skipped)


def model_lines() -> Iterator[str]:
    rows = [("model", "published as", "weights", "files")]
    for family in all_families():
        for model in family.models:
            files = " + ".join(file.filename for file in (model.backbone, model.head) if file)
            weights = sum(info.nbytes for info in family.sources(model.geometry).values())
            rows.append((model.name, model.published_name, f"{weights / 1e6:,.0f} MB", files))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, published, size, file_names in rows:
        yield f"{name:{widths[0]}}  {published:{widths[1]}}  {size:>{widths[2]}}  {file_names}"


def verification_lines(found: Verification) -> Iterator[str]:
    for check in found.checks:
        yield f"{check.name:14}{VERDICTS[check.passed]:8}{'not so: ' if check.passed is False else ''}{check.proves}"
        for line in (*_number_lines(check, found.device), *check.problems, *filter(None, [check.not_checked])):
            yield INDENT + line
    if found.predictions:
        yield "Predicted class:"
        for label, share in found.predictions:
            yield f"  {share:6.1%}  {label}"
    yield ", ".join(_cost(found.memory, found.seconds))
    said_by = "the source says" if found.device is not None else "was written"
    left = [f"{check.name} did not run" if check.passed is None else check.not_checked for check in found.checks]
    if not found.passed:
        yield f"The output is not what {said_by}. Do not use it."
    elif found.device is None or not any(left):
        yield "Looks ok!"
    else:
        yield f"Looks ok, as far as it was checked: {'; '.join(filter(None, left))}."


def _number_lines(check: Check, device: str | None) -> Iterator[str]:
    numbers = check.numbers
    if check.name == "parity" and "largest" in numbers:
        largest = f"largest difference {numbers['largest']:.3g}, allowed {numbers['tolerance']:g}"
        yield f"{len(numbers['differences'])} states on {device}: {largest}"
    if check.name == "preprocessing" and numbers.get("pil") is not None and numbers.get("default") is not None:
        default = f"by {numbers['default']:.3g} as {numbers['default_backend']}, transformers' own choice"
        grey_level = f"a grey level is {numbers['grey_level']:.3g}"
        yield f"pixels differ by {numbers['pil']:.3g} on Pillow, {default} ({grey_level})"
    if check.name == "preprocessing" and numbers.get("as_published"):
        yield (
            f"outputs differ by {_listed(numbers['as_published'])}, since Meta scales positions by (n + 0.1) / N "
            "(N patches a side, n here) and transformers to the size; interpolated the same way, by "
            f"{_listed(numbers['same_interpolation'])}"
        )


def _listed(differences: Mapping[str, Any]) -> str:
    return ", ".join(f"{difference:.3g} ({name})" for name, difference in differences.items())


def _cost(memory: Mapping[str, int | None], seconds: float) -> Iterator[str]:
    yield f"{seconds:.1f} s"
    if (peak := memory.get("host_anonymous_peak")) and (start := memory.get("host_anonymous_start")):
        yield f"{peak / 1e6:,.0f} MB of memory at peak, {start / 1e6:,.0f} MB of it torch's and transformers' own start"
    if (gpu_peak := memory.get("gpu_peak")) is not None:
        yield f"{gpu_peak / 1e6:,.0f} MB of GPU memory"
