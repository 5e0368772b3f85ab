"""A conversion from beginning to end; the only place that knows the order of its steps."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from streamconv._version import __version__
from streamconv.checkpoint.safetensors import INDEX_NAME
from streamconv.crc import RecordChecks
from streamconv.download import downloaded
from streamconv.errors import NoRangesError, UsageError
from streamconv.families import HEAD_PREFIX
from streamconv.folder import Mark, OutputFolder, claimed, find_finished, marks_of
from streamconv.labels import imagenet_labels, labels_in, read_labels
from streamconv.manifest import MANIFEST_NAME, is_of, manifest_bytes, read_manifest
from streamconv.output import temporary_path, write_file
from streamconv.plan import Plan, make_plan
from streamconv.progress import Progress, ignore_progress
from streamconv.shards import Shard
from streamconv.sources import OpenSource, Source, locate, opened
from streamconv.streaming import write_shard

Path_ = str | PathLike[str]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    ``shards`` are sha256 digests by file name, in hexadecimal; ``taken_up`` is how many bytes of them an
    interrupted one had left, which were checked and not written again. ``sent_to`` is the Hub's repository
    that has them where ``output`` keeps nothing. ``overflowed`` counts the values that are finite in the source
    and infinite in the output, since they are beyond the range of what they were cast to.
    """

    output: Path
    plan: Plan
    shards: dict[str, str]
    was_finished: bool
    taken_up: int
    is_crc_checked: bool
    labels_from: str | None
    sent_to: str | None = None
    overflowed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "output": str(self.output) if self.sent_to is None else None,
            "model": self.plan.model.name if self.plan.model else None,
            "architecture": self.plan.architecture,
            "bytes": self.plan.size,
            "shards": [
                {"file": s.filename, "bytes": s.size, "sha256": self.shards[s.filename]} for s in self.plan.shards
            ],
            "was_finished": self.was_finished,
            "taken_up": self.taken_up,
            "is_crc_checked": self.is_crc_checked,
            "labels_from": self.labels_from,
            "cast": self.plan.cast,
            "notes": self.plan.notes,
            "left_out": [str(each) for each in self.plan.left_out],
            "overflowed": self.overflowed,
        }


def plan(
    source: Path_,
    *,
    head: Path_ | None = None,
    labels: Path_ | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    select: str | None = None,
    num_heads: int | None = None,
) -> Plan:
    """What `convert` would write; no weight is read and nothing is written. Arguments and errors are its."""
    with opened(locate(source, head, select, num_heads), is_exact=False) as source_files:
        return _plan(source_files, labels, max_shard_size, dtype, ignore_progress)[0]


def convert(
    source: Path_,
    output_folder: Path_ | None = None,
    *,
    head: Path_ | None = None,
    labels: Path_ | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    select: str | None = None,
    num_heads: int | None = None,
    stream: bool = False,
    progress: Progress = ignore_progress,
) -> Conversion:
    """Convert a checkpoint into a folder that transformers loads.

    Args:
        source: A model's name, a checkpoint file, or its address (https://, hf://, s3://, …). A model's name
            means its file in torch.hub's folder, or else its address.
        output_folder: Where to; by default the name that the model was published under.
        head: A linear head's file, for a classifier from files.
        labels: A file of the classes' names; by default ImageNet's for 1000 classes.
        max_shard_size: Bytes, or "500MB", "5GB".
        dtype: What to cast the weights to, "float32", "float16" or "bfloat16"; None leaves them as they are stored.
        stream: Read an address straight into the output. Otherwise its file is kept in torch.hub's folder.
        progress: Told of the bytes written.

    Raises:
        UsageError, SourceError, OutputError: before anything is written, but for faults of the disks
            and for a damaged source. Then no file has its name before it is whole, and the same call
            goes on with what was synced.
    """
    located = locate(source, head, select, num_heads)
    if located.is_remote and not stream:
        with suppress(NoRangesError), opened(located, progress, is_exact=False) as index:
            decided = decide(index, output_folder, labels, max_shard_size, dtype, progress)
            if index.is_checkable and (finished := decided.find_finished()) is not None:
                return finished
        located = downloaded(located, progress)
    with opened(located, progress) as source_files:
        decided = decide(source_files, output_folder, labels, max_shard_size, dtype, progress)
        finished = decided.find_finished()
        if finished is not None:
            return finished
        plan, folder = decided.plan, decided.folder
        with claimed(folder, decided.conversion, decided.names, plan.size) as work:
            written, taken_up = _write_shards(plan, work, progress)
            for name, data in plan.files.items():
                work.write(name, data)
            manifest = manifest_of(decided.conversion, plan, written, source_files.is_checkable)
            work.write(MANIFEST_NAME, manifest_bytes(manifest))
            if plan.index is not None:  # last: with it, the folder is a model
                work.write(INDEX_NAME, plan.index)
            work.finish()
        return decided.done(written, taken_up)


@dataclass(frozen=True)
class Decision:
    """A conversion before anything is written: ``conversion`` is what the manifest will say of it.

    ``names`` are the files' that it writes, but for the manifest.
    """

    folder: Path
    plan: Plan
    names: list[str]
    conversion: dict[str, Any]
    labels_from: str | None
    is_checkable: bool

    def find_finished(self) -> Conversion | None:
        finished = find_finished(self.folder, self.conversion, self.names)
        if finished is None:
            return None
        marks = marks_of(finished)
        written = {shard.filename: marks[shard.filename] for shard in self.plan.shards}
        recorded = (finished["labels"] or {}).get("from")
        return replace(self.done(written, self.plan.weights), was_finished=True, labels_from=recorded)

    def done(self, written: Mapping[str, Mark], taken_up: int, sent_to: str | None = None) -> Conversion:
        """Told of the shards' marks."""
        return Conversion(
            output=self.folder,
            plan=self.plan,
            shards={name: mark.sha256 for name, mark in written.items()},
            was_finished=False,
            taken_up=taken_up,
            is_crc_checked=self.is_checkable,
            labels_from=self.labels_from,
            sent_to=sent_to,
            overflowed=sum(mark.overflowed for mark in written.values()),
        )


def decide(
    source: OpenSource,
    output_folder: Path_ | None,
    labels: Path_ | None,
    max_shard_size: int | str,
    dtype: str | None,
    progress: Progress,
) -> Decision:
    """All that there is to decide. Arguments and errors are `convert`'s."""
    plan, labels_from = _plan(source, labels, max_shard_size, dtype, progress)
    if output_folder is not None and not fspath(output_folder):
        raise UsageError("The output folder's name is empty. Give -o DIR.")
    folder = Path(output_folder) if output_folder is not None else default_folder(plan, source.source)
    names = [shard.filename for shard in plan.shards] + list(plan.files) + [INDEX_NAME] * (plan.index is not None)
    _refuse_own_output(source, folder, names)
    conversion: dict[str, Any] = {
        "model": plan.model.name if plan.model else None,
        "source": source.describe(),
        "select": source.source.select,
        "num_heads": source.source.num_heads,
        "filled": dict(plan.filled),
        "block_chunks": plan.block_chunks,
        "notes": list(plan.notes),
        "left_out": [str(each) for each in plan.left_out],
        "plan": plan.fingerprint,
        "labels": plan.config.get("id2label")
        and {
            "from": labels_from,
            "is_default": labels is None,
            "sha256": plan.labels_digest,
        },
    }
    return Decision(folder, plan, names, conversion, labels_from, source.is_checkable)


def manifest_of(
    conversion: dict[str, Any], plan: Plan, written: Mapping[str, Mark], is_crc_checked: bool
) -> dict[str, Any]:
    index = {INDEX_NAME: plan.index} if plan.index is not None else {}
    small = {**plan.files, **index}.items()
    return {
        **conversion,
        "source": {
            role: {key: value for key, value in file.items() if key != "changed_ns"}
            for role, file in conversion["source"].items()
        },
        "architecture": plan.architecture,
        "files": {
            **{name: _described(mark) for name, mark in written.items()},
            **{name: {"size": len(data), "sha256": sha256(data).hexdigest()} for name, data in small},
        },
        "is_crc_checked": is_crc_checked,
        "cast": plan.cast,
        "versions": {"streamconv": __version__, "python": platform.python_version()},
        "verification": None,
    }


def _described(mark: Mark) -> dict[str, Any]:
    overflowed = {"overflowed": mark.overflowed} if mark.overflowed else {}
    return {"size": mark.size, "sha256": mark.sha256, **overflowed}


def _refuse_own_output(source: OpenSource, folder: Path, names: list[str]) -> None:
    """A source that lies where a file will be written would be destroyed by its own conversion."""
    written = [
        each for name in names for each in (folder / name, temporary_path(folder / name)) if os.path.exists(each)
    ]
    for path in (path for checkpoint in source.checkpoints.values() for path in checkpoint.paths):
        if any(os.path.samefile(path, each) for each in written):
            raise UsageError(f"{path} is the source, and {folder} would write over it. Choose another folder.")


def default_folder(plan: Plan, source: Source) -> Path:
    """The name that the model was published under.

    Raises:
        UsageError: it is no published model.
    """
    if plan.model is None:
        raise UsageError(f"{source.backbone} is no published model, so the output needs a name. Give -o DIR.")
    return Path(plan.model.published_name)


def record_verification(folder: Path, verification: dict[str, Any], source: dict[str, Any]) -> None:
    """Keep what a verification against ``source`` found in the folder's manifest, where it is of that source."""
    manifest = read_manifest(folder)
    if manifest is not None and is_of(manifest, source):
        write_file(folder / MANIFEST_NAME, manifest_bytes({**manifest, "verification": verification}))


def _plan(
    source: OpenSource, labels: Path_ | None, max_shard_size: int | str, dtype: str | None, progress: Progress
) -> tuple[Plan, str | None]:
    names: Sequence[str] | None = None
    labels_from = None
    if HEAD_PREFIX + "bias" in source.tensors:
        if labels is not None:
            names, labels_from = read_labels(Path(labels)), Path(labels).name
        elif own := labels_in(source.selection.config):
            names, labels_from = own, "config.json of what was converted"
        elif source.tensors[HEAD_PREFIX + "bias"].info.shape == (1000,):
            progress("asking the Hub for ImageNet's labels", 0, 1, "steps")
            names, labels_from = imagenet_labels()
    elif labels is not None:
        raise UsageError("Labels are for a classifier. Name a _1layer model, or give its --head.")
    plan = make_plan(source.tensors, source.where, names, max_shard_size, dtype=dtype, **source.said)
    return plan, labels_from


def _write_shards(plan: Plan, folder: OutputFolder, progress: Progress) -> tuple[dict[str, Mark], int]:
    """Their marks by name, and how many of their bytes were there before."""
    taken_up, checks = 0, RecordChecks()
    written = {}
    for shard in plan.shards:
        written[shard.filename], kept = write_shard(shard, folder, checks, advance_in(plan, shard, progress))
        taken_up += kept
    return written, taken_up


def advance_in(plan: Plan, shard: Shard, progress: Progress) -> Callable[[int, bool], None]:
    """What `write_shard` tells of one shard, as progress of them all."""
    sizes = [each.size for each in plan.shards]
    before, total = sum(sizes[: plan.shards.index(shard)]), sum(sizes)

    def advance(position: int, is_kept: bool) -> None:
        progress(f"{'checking' if is_kept else 'writing'} {shard.filename}", before + position, total, "bytes")

    return advance
