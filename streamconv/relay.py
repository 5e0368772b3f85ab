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

from streamconv.card import CARD_NAME
from streamconv.checkpoint.safetensors import INDEX_NAME
from streamconv.convert import Conversion, Decision, advance_in, decide, manifest_of
from streamconv.crc import RecordChecks
from streamconv.errors import MissingUploadError, UsageError
from streamconv.folder import Mark, OutputFolder, claimed
from streamconv.hub import Repository
from streamconv.manifest import MANIFEST_NAME, manifest_bytes
from streamconv.output import explained
from streamconv.plan import Plan
from streamconv.progress import Progress
from streamconv.publishing import card_files, commit_message
from streamconv.sources import OpenSource, locate, opened
from streamconv.streaming import write_shard
from streamconv.verify import Verification

OUTLINE_NAME = ".streamconv-outline"

Path_ = str | PathLike[str]
Verify = Callable[[Plan, OpenSource, Mapping[str, Any], Path], Verification]


@dataclass(frozen=True)
class Relayed:
    """``published`` is the commit's or pull request's address; None where verification did not let it be made."""

    conversion: Conversion
    verification: Verification | None
    published: str | None


def relay(
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
) -> Relayed:
    """Convert, verify and publish. Arguments are `streamconv.convert`'s, but for

    Args:
        output_folder: Where a shard is, until it is sent.
        verify: Asked of what was sent, with a folder for an outline, as `streamconv.verify.verify_sent` is.
        unverified: Whether to publish, too, what ``verify`` does not pass.

    Raises:
        UsageError, SourceError, OutputError: as `streamconv.convert` and `hub.publish` say. The same call
            goes on with what was sent.
    """
    with opened(locate(source, head, select, num_heads), progress) as source_files:
        decided = decide(source_files, output_folder, labels, max_shard_size, dtype, progress)
        plan = decided.plan
        if decided.find_finished() is not None:
            raise UsageError(
                f"{decided.folder} holds the finished model, which is not to be deleted. Leave --stream out to push it "
                "from there, or name another folder by -o DIR."
            )
        repository.refuse_others([*decided.names, MANIFEST_NAME, CARD_NAME])
        largest = max(shard.size for shard in plan.shards)
        with claimed(decided.folder, decided.conversion, decided.names, largest) as work:
            repository.create()
            written, taken_up = _send_shards(plan, work, repository, progress)
            manifest = manifest_of(decided.conversion, plan, written, source_files.is_checkable)
            found = None
            if verify is not None:
                with _outline(work.path) as outline:
                    found = verify(plan, source_files, manifest, outline)
                # The pictures are for JSON and the report: the manifest stays a text to read.
                manifest["verification"] = {**found.as_dict(), "pictures": {}}
            published = None
            if unverified or (found is not None and found.passed):
                progress(f"committing to {repository.id}", 0, 1, "steps")
                published = _commit(decided, manifest, work, repository)
        return Relayed(decided.done(written, taken_up, repository.id), found, published)


def _send_shards(
    plan: Plan, work: OutputFolder, repository: Repository, progress: Progress
) -> tuple[dict[str, Mark], int]:
    """Their marks by name, and how many of their bytes an interrupted run had sent or written."""
    written, taken_up, checks = {}, 0, RecordChecks()
    for shard in plan.shards:
        sent = work.sent(shard.filename, repository.id)
        if sent is not None and sent.size == shard.size:
            repository.restore(shard.filename, sent.size, sent.sha256)
            written[shard.filename], taken_up = sent, taken_up + sent.size
            continue
        written[shard.filename], kept = write_shard(shard, work, checks, advance_in(plan, shard, progress))
        sha256 = written[shard.filename].sha256
        repository.upload(work.path / shard.filename, shard.filename, sha256, progress)  # reads it back, and checks it
        work.let_go(shard.filename, repository.id)
        taken_up += kept
    return written, taken_up


@contextmanager
def _outline(folder: Path) -> Iterator[Path]:
    path = folder / OUTLINE_NAME
    with explained(path):
        shutil.rmtree(path, ignore_errors=True)  # a killed process's
        path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _commit(decided: Decision, manifest: Mapping[str, Any], work: OutputFolder, repository: Repository) -> str:
    plan = decided.plan
    small = {**plan.files, **({INDEX_NAME: plan.index} if plan.index is not None else {})}
    small |= {MANIFEST_NAME: manifest_bytes(manifest), **card_files(decided.folder, repository, manifest)}
    try:
        published = repository.commit(small, commit_message(manifest))
    except MissingUploadError as error:
        for name in error.names:
            work.forget(name)
        raise
    work.dissolve(decided.names)
    return published
