"""The text output of the commands: one function per kind of result, each yielding lines to print."""

from collections.abc import Iterator, Sequence
from typing import Any

from streamconv.cli.layout import Line
from streamconv.cli.units import duration, size, speed
from streamconv.families.base import Family, Model
from streamconv.families.registry import all_families
from streamconv.families.selection import Skipped
from streamconv.hub.destination import PushTarget
from streamconv.jobs.conversion import Conversion
from streamconv.jobs.publish import Published
from streamconv.jobs.revert import Reverted
from streamconv.jobs.synth import SyntheticFiles
from streamconv.planning.plan import Plan

WARNING = "yellow"
MORE_FILES = "files", "--json"
MAX_WIDTH = 100  # characters of the column of names
FEW = 5  # lines of one kind that are shown if there may be thousands


def conversion_lines(done: Conversion) -> Iterator[Line | str]:
    place = f"converted into {done.output}" if done.part is None else f"part {done.part} converted into {done.output}"
    if done.sent_to is not None:
        place = f"converted and uploaded to {done.sent_to}, one file at a time"
    if done.was_finished:
        yield f"{done.plan.title}: was already {place}; nothing was changed"
    else:
        written = (shard.size for shard in done.plan.shards if shard.filename in done.shards)
        weights = done.plan.weights if done.part is None else sum(written)
        work = _work(weights, done.resumed_bytes, done.seconds, bool(done.restored))
        yield f"{done.plan.title}: {place}, {work}"
    yield from _details(done)


def finished_lines(done: Conversion) -> Iterator[Line | str]:
    """Yield the result of `streamconv.finish`."""
    if done.was_finished:
        yield f"{done.plan.title}: {done.output} was finished already; nothing was changed"
    else:
        checked = (
            f"{_count(len(done.shards), 'weight file')}, {size(done.plan.weights)}, checked in {duration(done.seconds)}"
        )
        yield f"{done.plan.title}: finished {done.output}, {checked}"
    yield from _details(done)


def _details(done: Conversion) -> Iterator[Line | str]:
    yield from few([f"  {name} was {loss}, and was written again" for name, loss in done.restored.items()], *MORE_FILES)
    for name in done.edited:
        kept = f"{done.output}/{name} was changed after the conversion; it is kept. To write it again, use --force"
        yield _warning(kept)
    for name in done.replaced:
        yield f"  {done.output}/{name} had been changed after the conversion; --force replaced it"
    files = [
        _file(s.filename, s.size, done.shards[s.filename], done.was_finished)
        for s in done.plan.shards
        if s.filename in done.shards
    ]
    yield from few(files, *MORE_FILES)
    if done.plan.cast:
        yield "  cast from {from} to {to}".format_map(done.plan.cast)
    if done.overflow_count:
        dtype = done.plan.config["dtype"]
        yield _warning(f"{done.overflow_count:,} finite values are outside the range of {dtype} and are now infinite")
    if not done.is_crc_checked:
        yield _warning("the source has no CRC-32s, so its bytes could not be checked for damage")
    if done.part is not None:  # the command that made the plan has shown the rest
        return
    yield from remark_lines(done.plan)
    if done.labels_from:
        yield f"  labels from {done.labels_from}"


def reverted_lines(done: Reverted) -> Iterator[Line | str]:
    place = " and ".join(map(str, done.files))
    yield f"{done.title}: reverted into {place}, {_work(done.weights, done.resumed_bytes, done.seconds)}"
    yield from (f"  restored as the authors' code initializes it: {each}" for each in done.restored)
    yield from (_file(path.name, file.size, file.sha256) for path, file in done.written.items())
    yield "  the folder's files were not verified first; `streamconv verify DIR` does that if DIR has a streamconv.json"


def target_text(target: PushTarget) -> str:
    """Describe the repository that is pushed to, and whether everybody can read it."""
    if target.exists:
        return f"{target.url}, which is {'private' if target.private else 'public'}"
    kind = "private" if target.private else "public (add --private for a private one)"
    return f"{target.url}, a new repository: {kind}"


def published_lines(done: Published) -> Iterator[str]:
    if done.was_published:
        yield f"already published, nothing was changed: {done.url}"
    else:
        yield f"published: {done.url}"


def synth_lines(written: SyntheticFiles) -> Iterator[str]:
    paths = [path for path in (written.backbone, written.head) if path is not None]
    yield from (f"{path}  {size(path.stat().st_size)}" for path in paths)


def _work(weights: int, resumed_bytes: int, seconds: float, was_finished: bool = False) -> str:
    """Describe what was written, and how fast. Bytes of an earlier run do not count towards the speed."""
    new, earlier = weights - resumed_bytes, "by an earlier run" if was_finished else "before an interruption"
    if new <= 0:
        return f"{size(weights)}, all of it {earlier}"
    resumed = f", {size(resumed_bytes)} of it {earlier}" if resumed_bytes else ""
    rest = f"; the other {size(new)}" if resumed else ""
    return f"{size(weights)}{resumed}{rest} in {duration(seconds)}, {speed(new, seconds)}"


def _file(name: str, nbytes: int, sha256: str, is_recorded: bool = False) -> str:
    if not sha256:
        return f"  {name}  {size(nbytes)}  copied by its store, which leaves its sha256 unknown; its CRC-32s match"
    return f"  {name}  {size(nbytes)}  sha256 {sha256[:12]}{' as recorded' if is_recorded else ''}"


def few(lines: Sequence[str], kind: str, option: str) -> Iterator[str]:
    """Yield the first lines; if there are many, the number of the others and the option that shows them."""
    shown = FEW if len(lines) > FEW + 1 else len(lines)
    yield from lines[:shown]
    if len(lines) > shown:
        indent = " " * (len(lines[0]) - len(lines[0].lstrip()))
        yield f"{indent}… and {len(lines) - shown:,} more {kind}; {option} shows them all"


def remark_lines(plan: Plan) -> Iterator[str]:
    """Yield the assumptions of a plan and the parts that it skips."""
    yield from (f"  {note}" for note in plan.notes)
    skipped = [f"  skipped: {_skipped(each)}" for each in plan.skipped]
    yield from few(skipped, "skipped parts", "--json")


def _skipped(each: Skipped) -> str:
    return f"{each.pattern} ({_count(each.tensors, 'tensor')}, {size(each.nbytes)}): {each.reason}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _warning(text: str) -> Line:
    return Line("warning:", f" {text}", hang=len("  warning: "), colour=WARNING, label="  ")


# Entries of config.json that describe a model to a person who trained it.
_SIZES = {
    "hidden_size": "hidden size {}",
    "num_hidden_layers": "{} layers",
    "num_attention_heads": "{} attention heads",
    "patch_size": "patches of {0} x {0}",
    "image_size": "positions for {0} x {0} pixels",
    "num_register_tokens": "{} registers",
}


def plan_lines(plan: Plan, with_mapping: bool = False) -> Iterator[Line | str]:
    """Yield the summary of a plan and, on request, all tensors, files and skipped parts."""
    cast = ", cast from {from}".format_map(plan.cast) if plan.cast else ""
    rows = [("parameters", f"{plan.parameters:,} in {plan.config['dtype']}{cast}"), ("size", size(plan.size))]
    sizes = [text.format(plan.config[key]) for key, text in _SIZES.items() if plan.config.get(key)]
    rows += [("model", ", ".join(sizes))] if sizes else []
    shards = [f"{s.filename}  {size(s.size)}, {_count(len(s.tensors), 'tensor')}" for s in plan.shards]
    skipped = [_skipped(each) for each in plan.skipped]
    if not with_mapping:
        shards = [*few(shards, "files", "--mapping")]
        skipped = [*few(skipped, "skipped parts", "--mapping")]
    files = [*shards, ", ".join(plan.filenames[len(plan.shards) :])]
    for name, texts in (("files", files), ("skipped", skipped), ("assumed", plan.notes)):
        rows += [("" if i else name, text) for i, text in enumerate(texts)]
    yield f"{plan.title}, as {plan.architecture}"
    yield from (Line(f"  {name:10}  ", text) for name, text in rows)
    yield ""
    targets = len({target for move in plan.mapping for target in move.targets})
    becomes = f"{_count(len(plan.mapping), 'source tensor')} become{'s' * (len(plan.mapping) == 1)} {targets:,}"
    if not with_mapping:
        yield f"{becomes}; --mapping shows how."
        return
    yield f"{becomes}:"
    width = min(max(len(move.source) for move in plan.mapping), MAX_WIDTH)
    for move in plan.mapping:
        yield Line("", f"{move.source:{width}}  {move.info!s:24}  -> {', '.join(move.targets)}", 4)


def model_lines() -> Iterator[Line | str]:
    """Yield a table for each family and licence, 80 columns wide at most."""
    for family, licence, models in _groups():
        yield Line(f"{family.name}, licence {licence}", "", is_bold=True)
        rows = [(each.name, each.published_name, size(_weights(family, each))) for each in models]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, published, weights in rows:
            yield f"{name:{widths[0]}}  {published:{widths[1]}}  {weights:>{widths[2]}}"


def models_as_dict() -> dict[str, Any]:
    """Return all models for JSON, with the URLs of their files."""
    return {
        "models": [
            {
                "name": model.name,
                "published_name": model.published_name,
                "family": family.name,
                "licence": model.licence,
                "bytes": _weights(family, model),
                "files": [{"file": file.filename, "url": file.url} for file in (model.backbone, model.head) if file],
            }
            for family in all_families()
            for model in family.models
        ]
    }


def _groups() -> Iterator[tuple[Family, str, Sequence[Model]]]:
    for family in all_families():
        for licence in dict.fromkeys(model.licence for model in family.models):
            yield family, licence, [model for model in family.models if model.licence == licence]


def _weights(family: Family, model: Model) -> int:
    return sum(info.nbytes for info in family.sources(model.dimensions).values())
