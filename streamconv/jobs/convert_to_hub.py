"""Converts a source straight to the Hub: each shard is written, checked, uploaded and deleted before the next one.

The output folder is only for staging and is removed at the end. Until then its journal records which shards were
uploaded, so that an interrupted run does not upload them again. After verification, one commit makes the model visible.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from streamconv.errors import MissingUploadError, UsageError
from streamconv.files.reader import Reader
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.hub.card import CARD_NAME
from streamconv.hub.repository import Repository
from streamconv.jobs.conversion import Conversion, PreparedConversion
from streamconv.jobs.options import PushOptions, StrPath
from streamconv.jobs.prepare import PreparedSource
from streamconv.jobs.publish import Published, card_files, commit
from streamconv.logs import logger
from streamconv.output.files import as_output_error
from streamconv.output.folder import OutputFolder, open_output_folder
from streamconv.output.manifest import MANIFEST_NAME, Manifest, WrittenFile
from streamconv.output.writer import with_progress, write_shard
from streamconv.progress import Progress
from streamconv.source.outputs import is_shard_remembered, remember_shard
from streamconv.tensors.checksums import RecordChecks
from streamconv.verification.result import Verification

_log = logger(__name__)

SPARSE_FOLDER_NAME = ".streamconv-sparse"

Verify = Callable[[PreparedSource, Manifest, Path], Verification]
"""Verifies what was uploaded: called with the source, the manifest, and an empty folder for a sparse copy."""


@dataclass(frozen=True)
class HubConversion:
    """The result. ``published`` is None if verification did not pass; then nothing was made visible."""

    conversion: Conversion
    verification: Verification | None
    published: Published | None


def convert_to_hub(
    prepared: PreparedSource,
    output: StrPath | None,
    repository: Repository,
    verify: Verify | None,
    *,
    push: PushOptions,
    force: bool,
    progress: Progress,
) -> HubConversion:
    """Convert, verify and publish.

    Args:
        output: The staging folder.
        verify: None to skip verification.
        push: Whether to publish even if verification does not pass or does not run, and what the model card says.
        force: Replace a conversion in the staging folder.

    Raises:
        UsageError, SourceError, OutputError, HubError: the same call resumes, and uploads no shard again.
    """
    conversion = PreparedConversion.of(prepared, output, force=force)
    plan = conversion.plan
    refuse_finished(conversion)
    repository.refuse_others([*plan.filenames, MANIFEST_NAME, CARD_NAME])
    largest = max(shard.size for shard in plan.shards)
    start = time.monotonic()
    with open_output_folder(conversion.folder, conversion.provenance, plan.filenames, largest, force=force) as work:
        repository.create()
        written, resumed_bytes = _upload_shards(conversion, work, repository, prepared.source.reader, progress)
        seconds = time.monotonic() - start
        manifest = conversion.planned.manifest(written)
        verification, published = None, None
        if verify is not None:
            with _sparse_folder(work.path) as folder:
                verification = verify(prepared, manifest, folder)
            manifest = replace(manifest, verification=verification.as_record())
        if push.unverified or (verification is not None and verification.passed):
            published = _commit(conversion, manifest, work, repository, push, progress)
    return HubConversion(conversion.result(written, resumed_bytes, seconds, repository.id), verification, published)


def refuse_finished(conversion: PreparedConversion) -> None:
    """Refuse a staging folder that holds the finished model or a user's edits of it, which would be deleted.

    Raises:
        UsageError
    """
    earlier = conversion.find_earlier()
    if earlier.finished is not None:
        raise UsageError(
            f"{conversion.folder} holds the finished model, which would be deleted. Omit --stream to push it from "
            "there, or choose another folder with -o DIR."
        )
    if earlier.edited:
        raise UsageError(
            f"{conversion.folder / earlier.edited[0]} was not written by streamconv, or changed since, and would be "
            "deleted. Choose another folder with -o DIR, or replace it with --force."
        )


def _upload_shards(
    conversion: PreparedConversion, work: OutputFolder, repository: Repository, reader: Reader, progress: Progress
) -> tuple[dict[str, WrittenFile], int]:
    """Write each shard, upload it, and delete it from the disk.

    Nothing compares the uploaded bytes with the source. So a model that is called its authors' own resumes only shards
    that this machine wrote as a whole: other bytes may be from another file, with the same CRC-32s, or another machine.

    Returns:
        The shards by name, and how many of their bytes an interrupted run had uploaded or written.
    """
    source = conversion.provenance.source
    is_published = any(file.published for file in source.values())
    written, resumed_bytes, checks = {}, 0, RecordChecks(reader)
    for shard, advance in with_progress(conversion.plan.shards, progress):
        uploaded = work.uploaded(shard.filename, repository.id)
        is_known = not is_published or (uploaded and is_shard_remembered(source, shard.filename, uploaded))
        if uploaded is not None and uploaded.size == shard.size and is_known:
            repository.restore(shard.filename, uploaded.size, uploaded.sha256)
            _log.info("%s has %s already, from an interrupted run", repository.id, shard.filename)
            written[shard.filename], resumed_bytes = uploaded, resumed_bytes + uploaded.size
            continue
        if is_published:
            work.discard(shard.filename)
        written[shard.filename], kept = write_shard(shard, work, reader, checks, advance)
        sha256 = written[shard.filename].sha256
        # This reads the file back and compares its sha256.
        repository.upload(work.path / shard.filename, shard.filename, sha256, progress)
        if is_published:
            remember_shard(source, shard.filename, written[shard.filename])
        work.mark_uploaded(shard.filename, repository.id)
        _log.info("uploaded %s to %s", shard.filename, repository.id)
        resumed_bytes += kept
    return written, resumed_bytes


@contextmanager
def _sparse_folder(folder: Path) -> Iterator[Path]:
    import shutil  # takes a quarter of a megabyte

    path = folder / SPARSE_FOLDER_NAME
    with as_output_error(path):
        shutil.rmtree(path, ignore_errors=True)  # a killed process left it
        path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _commit(
    conversion: PreparedConversion,
    manifest: Manifest,
    work: OutputFolder,
    repository: Repository,
    push: PushOptions,
    progress: Progress,
) -> Published:
    plan = conversion.plan
    small = {**plan.small_files, **({INDEX_NAME: plan.index} if plan.index is not None else {})}
    small |= {MANIFEST_NAME: manifest.to_bytes(), **card_files(conversion.folder, repository, manifest, push)}
    try:
        published = commit(repository, small, manifest, progress)
    except MissingUploadError as error:
        for name in error.names:
            work.discard(name)
        raise
    work.remove_staging(plan.filenames)
    return published
