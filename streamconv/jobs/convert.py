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
from streamconv.errors import NoRangesError, UsageError
from streamconv.families.base import HEAD_PREFIX
from streamconv.files.reader import Reader
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.jobs.options import ConversionOptions
from streamconv.output.files import temporary_path
from streamconv.output.folder import OutputFolder, find_finished, open_output_folder
from streamconv.output.journal import ResumePoint, resume_points_in
from streamconv.output.manifest import (
    MANIFEST_NAME,
    _described,
    manifest_bytes,
)
from streamconv.output.writer import write_shard
from streamconv.planning.make import make_plan
from streamconv.planning.plan import Plan
from streamconv.planning.shards import Shard
from streamconv.progress import Progress, ignore_progress
from streamconv.source.download import downloaded
from streamconv.source.labels import imagenet_labels, labels_in, read_labels
from streamconv.source.open import OpenSource, open_source
from streamconv.source.resolve import Source, resolve_source
from streamconv.tensors.checksums import RecordChecks

Path_ = str | PathLike[str]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    ``shards`` are sha256 digests by file name, in hexadecimal; ``resumed_bytes`` is how many bytes of them an
    interrupted one had left, which were checked and not written again. ``sent_to`` is the Hub's repository
    that has them where ``output`` keeps nothing. ``overflow_count`` counts the values that are finite in the source
    and infinite in the output, since they are beyond the range of what they were cast to.
    """

    output: Path
    plan: Plan
    shards: dict[str, str]
    was_finished: bool
    resumed_bytes: int
    is_crc_checked: bool
    labels_from: str | None
    sent_to: str | None = None
    overflow_count: int = 0

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
            "resumed_bytes": self.resumed_bytes,
            "is_crc_checked": self.is_crc_checked,
            "labels_from": self.labels_from,
            "cast": self.plan.cast,
            "notes": self.plan.notes,
            "skipped": [str(each) for each in self.plan.skipped],
            "overflow_count": self.overflow_count,
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
    with open_source(resolve_source(source, head, select, num_heads), read_local_headers=False) as source_files:
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
    located = resolve_source(source, head, select, num_heads)
    if located.is_remote and not stream:
        with suppress(NoRangesError), open_source(located, progress, read_local_headers=False) as index:
            decided = prepare_conversion(index, output_folder, labels, max_shard_size, dtype, progress)
            if index.has_checksums and (finished := decided.find_finished()) is not None:
                return finished
        located = downloaded(located, progress)
    with open_source(located, progress) as source_files:
        decided = prepare_conversion(source_files, output_folder, labels, max_shard_size, dtype, progress)
        finished = decided.find_finished()
        if finished is not None:
            return finished
        plan, folder = decided.plan, decided.folder
        with open_output_folder(folder, decided.conversion, decided.names, plan.size) as work:
            written, resumed_bytes = _write_shards(plan, work, source_files.reader, progress)
            for name, data in plan.small_files.items():
                work.write(name, data)
            manifest = build_manifest(decided.conversion, plan, written, source_files.has_checksums)
            work.write(MANIFEST_NAME, manifest_bytes(manifest))
            if plan.index is not None:  # last: with it, the folder is a model
                work.write(INDEX_NAME, plan.index)
            work.finish()
        return decided.done(written, resumed_bytes)


@dataclass(frozen=True)
class PreparedConversion:
    """A conversion before anything is written: ``conversion`` is what the manifest will say of it.

    ``names`` are the files' that it writes, but for the manifest.
    """

    folder: Path
    plan: Plan
    names: list[str]
    conversion: dict[str, Any]
    labels_from: str | None
    has_checksums: bool

    def find_finished(self) -> Conversion | None:
        finished = find_finished(self.folder, self.conversion, self.names)
        if finished is None:
            return None
        marks = resume_points_in(finished)
        written = {shard.filename: marks[shard.filename] for shard in self.plan.shards}
        recorded = (finished["labels"] or {}).get("from")
        return replace(self.done(written, self.plan.weights), was_finished=True, labels_from=recorded)

    def done(self, written: Mapping[str, ResumePoint], resumed_bytes: int, sent_to: str | None = None) -> Conversion:
        """Told of the shards' marks."""
        return Conversion(
            output=self.folder,
            plan=self.plan,
            shards={name: mark.sha256 for name, mark in written.items()},
            was_finished=False,
            resumed_bytes=resumed_bytes,
            is_crc_checked=self.has_checksums,
            labels_from=self.labels_from,
            sent_to=sent_to,
            overflow_count=sum(mark.overflow_count for mark in written.values()),
        )


def prepare_conversion(
    source: OpenSource,
    output_folder: Path_ | None,
    labels: Path_ | None,
    max_shard_size: int | str,
    dtype: str | None,
    progress: Progress,
) -> PreparedConversion:
    """All that there is to decide. Arguments and errors are `convert`'s."""
    plan, labels_from = _plan(source, labels, max_shard_size, dtype, progress)
    if output_folder is not None and not fspath(output_folder):
        raise UsageError("The output folder's name is empty. Give -o DIR.")
    folder = Path(output_folder) if output_folder is not None else default_folder(plan, source.source)
    names = [shard.filename for shard in plan.shards] + list(plan.small_files) + [INDEX_NAME] * (plan.index is not None)
    _refuse_own_output(source, folder, names)
    conversion: dict[str, Any] = {
        "model": plan.model.name if plan.model else None,
        "source": source.describe(),
        "select": source.source.select,
        "num_heads": source.source.num_heads,
        "filled": dict(plan.filled),
        "block_chunks": plan.block_chunks,
        "notes": list(plan.notes),
        "skipped": [str(each) for each in plan.skipped],
        "plan": plan.fingerprint,
        "labels": plan.config.get("id2label")
        and {
            "from": labels_from,
            "is_default": labels is None,
            "sha256": plan.labels_digest,
        },
    }
    return PreparedConversion(folder, plan, names, conversion, labels_from, source.has_checksums)


def build_manifest(
    conversion: dict[str, Any], plan: Plan, written: Mapping[str, ResumePoint], is_crc_checked: bool
) -> dict[str, Any]:
    index = {INDEX_NAME: plan.index} if plan.index is not None else {}
    small = {**plan.small_files, **index}.items()
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


def _plan(
    source: OpenSource, labels: Path_ | None, max_shard_size: int | str, dtype: str | None, progress: Progress
) -> tuple[Plan, str | None]:
    options = ConversionOptions(max_shard_size=max_shard_size, dtype=dtype)  # type: ignore[arg-type]
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
    plan = make_plan(
        source.tensors,
        source.where,
        names,
        options.max_shard_bytes,
        dtype=options.dtype,
        filename=source.source.backbone.name,
        **source.said,
    )
    return plan, labels_from


def _write_shards(
    plan: Plan, folder: OutputFolder, reader: Reader, progress: Progress
) -> tuple[dict[str, ResumePoint], int]:
    """Their marks by name, and how many of their bytes were there before."""
    resumed_bytes, checks = 0, RecordChecks(reader)
    written = {}
    for shard in plan.shards:
        written[shard.filename], kept = write_shard(
            shard, folder, reader, checks, shard_progress(plan, shard, progress)
        )
        resumed_bytes += kept
    return written, resumed_bytes


def shard_progress(plan: Plan, shard: Shard, progress: Progress) -> Callable[[int, bool], None]:
    """What `write_shard` tells of one shard, as progress of them all."""
    sizes = [each.size for each in plan.shards]
    before, total = sum(sizes[: plan.shards.index(shard)]), sum(sizes)

    def advance(position: int, is_kept: bool) -> None:
        progress(f"{'checking' if is_kept else 'writing'} {shard.filename}", before + position, total, "bytes")

    return advance
