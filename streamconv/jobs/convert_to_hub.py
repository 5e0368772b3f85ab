"""From a source to the Hub with no more than one shard on the disk: convert, check, send, delete, next.

The folder is a staging place, and gone in the end. Until then its journal says which shards were sent,
so that an interrupted run sends none of them again. One commit makes the model visible, after the
verification.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from streamconv.errors import MissingUploadError, UsageError
from streamconv.files.reader import Reader
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.hub.card import CARD_NAME
from streamconv.hub.repository import Repository
from streamconv.jobs.convert import Conversion, PreparedConversion, build_manifest, prepare_conversion, shard_progress
from streamconv.jobs.publish import card_files, commit_message
from streamconv.output.files import as_output_error
from streamconv.output.folder import OutputFolder, open_output_folder
from streamconv.output.journal import ResumePoint
from streamconv.output.manifest import MANIFEST_NAME, manifest_bytes
from streamconv.output.writer import write_shard
from streamconv.planning.plan import Plan
from streamconv.progress import Progress
from streamconv.source.open import OpenSource, open_source
from streamconv.source.resolve import resolve_source
from streamconv.tensors.checksums import RecordChecks
from streamconv.verification.result import Verification

OUTLINE_NAME = ".streamconv-outline"

Path_ = str | PathLike[str]
Verify = Callable[[Plan, OpenSource, Mapping[str, Any], Path], Verification]


@dataclass(frozen=True)
class HubConversion:
    """``published`` is the commit's or pull request's address; None where verification did not let it be made."""

    conversion: Conversion
    verification: Verification | None
    published: str | None


def convert_to_hub(
    source: Path_,
    output_folder: Path_ | None,
    repository: Repository,
    verify: Verify | None,
    *,
    head: Path_ | None,
    labels: Path_ | None,
    max_shard_size: int | str,
    dtype: str | None,
    select: str | None,
    num_heads: int | None,
    unverified: bool,
    progress: Progress,
) -> HubConversion:
    """Convert, verify and publish. Arguments are `streamconv.convert`'s, but for

    Args:
        output_folder: Where a shard is, until it is sent.
        verify: Asked of what was sent, with a folder for an outline, as `streamconv.jobs.verify.verify_sent` is.
        unverified: Whether to publish, too, what ``verify`` does not pass.

    Raises:
        UsageError, SourceError, OutputError: as `streamconv.convert` and `hub.publish` say. The same call
            goes on with what was sent.
    """
    with open_source(resolve_source(source, head, select, num_heads), progress) as source_files:
        decided = prepare_conversion(source_files, output_folder, labels, max_shard_size, dtype, progress)
        plan = decided.plan
        if decided.find_finished() is not None:
            raise UsageError(
                f"{decided.folder} holds the finished model, which is not to be deleted. Leave --stream out to push it "
                "from there, or name another folder by -o DIR."
            )
        repository.refuse_others([*decided.names, MANIFEST_NAME, CARD_NAME])
        largest = max(shard.size for shard in plan.shards)
        with open_output_folder(decided.folder, decided.conversion, decided.names, largest) as work:
            repository.create()
            written, resumed_bytes = _send_shards(plan, work, repository, source_files.reader, progress)
            manifest = build_manifest(decided.conversion, plan, written, source_files.has_checksums)
            found = None
            if verify is not None:
                with _sparse_folder(work.path) as outline:
                    found = verify(plan, source_files, manifest, outline)
                # The pictures are for JSON and the report: the manifest stays a text to read.
                manifest["verification"] = {**found.as_dict(), "pictures": {}}
            published = None
            if unverified or (found is not None and found.passed):
                progress(f"committing to {repository.id}", 0, 1, "steps")
                published = _commit(decided, manifest, work, repository)
        return HubConversion(decided.done(written, resumed_bytes, repository.id), found, published)


def _send_shards(
    plan: Plan, work: OutputFolder, repository: Repository, reader: Reader, progress: Progress
) -> tuple[dict[str, ResumePoint], int]:
    """Their marks by name, and how many of their bytes an interrupted run had sent or written."""
    written, resumed_bytes, checks = {}, 0, RecordChecks(reader)
    for shard in plan.shards:
        sent = work.sent(shard.filename, repository.id)
        if sent is not None and sent.size == shard.size:
            repository.restore(shard.filename, sent.size, sent.sha256)
            written[shard.filename], resumed_bytes = sent, resumed_bytes + sent.size
            continue
        written[shard.filename], kept = write_shard(shard, work, reader, checks, shard_progress(plan, shard, progress))
        sha256 = written[shard.filename].sha256
        repository.upload(work.path / shard.filename, shard.filename, sha256, progress)  # reads it back, and checks it
        work.mark_uploaded(shard.filename, repository.id)
        resumed_bytes += kept
    return written, resumed_bytes


@contextmanager
def _sparse_folder(folder: Path) -> Iterator[Path]:
    path = folder / OUTLINE_NAME
    with as_output_error(path):
        shutil.rmtree(path, ignore_errors=True)  # a killed process's
        path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _commit(
    decided: PreparedConversion, manifest: Mapping[str, Any], work: OutputFolder, repository: Repository
) -> str:
    plan = decided.plan
    small = {**plan.small_files, **({INDEX_NAME: plan.index} if plan.index is not None else {})}
    small |= {MANIFEST_NAME: manifest_bytes(manifest), **card_files(decided.folder, repository, manifest)}
    try:
        published = repository.commit(small, commit_message(manifest))
    except MissingUploadError as error:
        for name in error.names:
            work.discard(name)
        raise
    work.remove_staging(decided.names)
    return published
