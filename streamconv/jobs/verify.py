"""Verifies an output: runs checks, the cheapest first. Each check states what it proves.

Importing this module does not import torch; the checks that run models do when they run.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from streamconv.files.address import Location, parse_folder
from streamconv.jobs.beside import beside
from streamconv.jobs.finished_output import require_finished
from streamconv.jobs.model_options import check_names, check_options, started_models
from streamconv.jobs.options import SourceOptions, StrPath, VerificationOptions
from streamconv.jobs.prepare import PreparedSource, local_copy, prepared_source
from streamconv.jobs.recorded import recorded_options, with_recorded_as_unproved
from streamconv.jobs.verify_alone import log_checks, now, verify_alone
from streamconv.jobs.verify_store import MODELS_NOT_RUN, refuse_model_options
from streamconv.logs import logger
from streamconv.output.files import write_file
from streamconv.output.manifest import Manifest, WrittenFile, in_order
from streamconv.output.snapshot import Snapshot
from streamconv.output.verdict import record_verdict
from streamconv.planning.plan import Plan
from streamconv.progress import Progress, ignore_progress, job
from streamconv.source.open import OpenSource
from streamconv.source.outputs import is_remembered, remember_output, remember_verdict
from streamconv.verification.bytes import cast_note, compare_with_source
from streamconv.verification.config import check_config, small_files
from streamconv.verification.edits import find_edits
from streamconv.verification.process import ModelJob, ModelRunner
from streamconv.verification.result import Check, ModelResults, Verification
from streamconv.verification.sparse_folder import write_sparse_folder
from streamconv.verification.unchanged import compare_with_manifest

_log = logger(__name__)


@job
def verify(
    folder: StrPath,
    source: StrPath | None = None,
    options: VerificationOptions = VerificationOptions(),
    source_options: SourceOptions = SourceOptions(),
    *,
    progress: Progress = ignore_progress,
) -> Verification:
    """Verify a converted folder against its source or, without one, against its own manifest.

    The result is recorded in the folder's manifest if the folder was made from this source. It lists the sha256 of each
    file that was read; if any of them changes meanwhile, there is no result. A difference is a result, not an error:
    see `Verification.passed`.

    The models run in a process that this one starts, and that ends with the job. If this process has imported
    transformers, they run here; only then can they read a streamed source from a file system that was registered with
    fsspec in this process. Threads may verify at the same time. The settings of the process stay as they are, so
    transformers' messages and progress bars are shown as the caller has set them. One exception: while torch.hub
    imports the authors' code (``reference``), it changes sys.path.

    An output in a store is read by ranges. Models are not run with it, and the result is not recorded there.

    Args:
        folder: The folder that `streamconv.convert` wrote, or its URL in a store (s3://, gs://, …).
        source: The source of the folder: a model's name, or the path or URL of a checkpoint. None reads only the
            folder: each file must have the size and sha256 that its manifest records.
        options: The device, the image, the code of the original model, and the report to write.
        source_options: How to read the source; by default, as the folder's manifest records.
        progress: Called with the bytes or steps of each check. An exception that it raises ends the job: see
            `Cancelled`.

    Raises:
        UsageError: the device, the image or the reference does not exist, or is given for an output in a store; the
            device has too little memory, or torch or transformers is not installed.
        SourceError: the source cannot be read.
        OutputError: there is no such folder, it is unfinished or changed meanwhile, or it can be verified only against
            a source and none is given.
    """
    path = parse_folder(folder, "folder")
    local = path if isinstance(path, Path) else None
    if local is None:
        refuse_model_options(options)
    require_finished(path)
    check_options(options, runs_models=source is not None and local is not None)
    if source is None:
        check_names(options, progress)
        verification = verify_alone(path, progress, options.command)
    else:
        with ExitStack() as stack:
            models = stack.enter_context(started_models(options, progress)) if local is not None else None
            conversion = recorded_options(path, source_options)
            prepared = stack.enter_context(prepared_source(source, conversion, progress, output=local, labels_of=path))
            prepared = with_recorded_as_unproved(prepared, path, source_options)
            if not conversion.stream:
                prepared = stack.enter_context(local_copy(prepared, progress))
            verification = verify_prepared(path, prepared, options, models, progress)
    write_report(verification, options)
    return verification


def verify_prepared(
    folder: Location,
    prepared: PreparedSource,
    options: VerificationOptions,
    models: ModelRunner | None,
    progress: Progress,
) -> Verification:
    """Verify a converted folder against an open source, and record the result in the folder's manifest.

    The bytes are compared while another process runs ``models``, if one does: the one mostly waits for the disk, the
    other computes. There are no models for a folder in a store. If this machine made a local folder from a remote
    source, that is read again for parity only: its bytes were checked when they were written, as the manifest records.

    Raises:
        SourceError: the source cannot be read, or was changed meanwhile.
        OutputError: the folder was changed meanwhile.
    """
    start, source = time.monotonic(), prepared.source
    manifest = Manifest.read(folder)
    names = {*prepared.plan.filenames, *(manifest.files if manifest is not None else ())}
    before = Snapshot.of(folder, names)  # everything is read after this, here and in the process that runs the models
    edits = find_edits(folder, prepared.plan, manifest)
    plan = edits.plan

    def compare(progress: Progress) -> tuple[Check, Mapping[str, WrittenFile]]:
        is_proved = source.is_remote and source.has_checksums and isinstance(folder, Path)
        if manifest is not None and is_proved and _was_made_here(manifest, source):
            return compare_with_manifest(folder, plan, manifest, progress)
        return compare_with_source(folder, plan, source.reader, source.has_checksums, progress)

    def run_models(progress: Progress) -> ModelResults:
        if models is None or not isinstance(folder, Path):
            return MODELS_NOT_RUN
        return models.check(ModelJob(plan, folder, source, options.parity, options.thorough), progress)

    if models is not None and models.is_elsewhere:
        progress("comparing bytes", 0, plan.weights, "bytes")
        (check, files), results = beside(compare, run_models, progress)
    else:
        (check, files), results = compare(progress), run_models(progress)
    config = edits.named_in(check_config(folder, plan, edits.files))
    files = {**files, **small_files(folder, names)}
    checks = (check, config, *results.checks)
    verification = _verification(plan, source, checks, results, files, start, options.command)
    verification = replace(verification, edited=edits.files)
    source.require_in_place()  # the models read it by its path, not from the open file
    verdict = verification.as_record()
    not_recorded = record_verdict(before, manifest, verdict, source.describe(), files)
    if not not_recorded:
        remember_verdict(verdict)
    if verification.passed:
        remember_output(verification.source, files, is_remote=source.is_remote)
    return replace(verification, not_recorded=not_recorded)


def _was_made_here(manifest: Manifest, source: OpenSource) -> bool:
    """Return whether this machine wrote the files that the manifest lists, and from this source."""
    return manifest.is_from(source.describe()) and is_remembered(manifest.source, manifest.files)


def verify_uploaded(
    prepared: PreparedSource,
    manifest: Manifest,
    folder: Path,
    options: VerificationOptions,
    models: ModelRunner,
    progress: Progress = ignore_progress,
) -> Verification:
    """Verify an output that was uploaded shard by shard and is not on the disk.

    Args:
        prepared: The output's source, which is still open, and its plan.
        manifest: Its manifest. Each shard had the recorded sha256 when it was written and when it was uploaded.
        folder: An empty folder for files with the headers of the shards and holes instead of weights.
    """
    start, source, plan = time.monotonic(), prepared.source, prepared.plan
    write_sparse_folder(plan, folder)
    results = models.check(ModelJob(plan, folder, source, options.parity, options.thorough, is_sparse=True), progress)
    numbers = {"tensors": sum(len(shard.tensors) for shard in plan.shards), "bytes": plan.weights}
    if source.has_checksums:
        proves = f"every file was uploaded as it was written{cast_note(plan)}; every source record matched its CRC-32"
        check = Check("bytes", True, proves, (), numbers, "the uploaded files were not read back")
    else:
        check = Check("bytes", None, "the source has no CRC-32s, and no output file was kept to be compared with it")
    config = check_config(folder, plan)
    checks = (check, config, *results.checks)
    return _verification(plan, source, checks, results, manifest.files, start, options.command)


def write_report(verification: Verification, options: VerificationOptions) -> None:
    """Write the HTML page, if one was requested."""
    if options.report is not None:
        from streamconv.verification.report import render  # imports what only a report needs

        write_file(Path(options.report), render(verification.as_dict()).encode())


def _verification(
    plan: Plan,
    source: OpenSource,
    checks: tuple[Check, ...],
    found: ModelResults,
    files: Mapping[str, WrittenFile],
    start: float,
    command: str,
) -> Verification:
    log_checks(checks)
    return Verification(
        checks=checks,
        device=found.device or None,
        reference=found.reference or None,
        versions=found.versions,
        source=source.describe(),
        output={
            **plan.names,
            "architecture": plan.architecture,
            "dtype": plan.config["dtype"],
            "cast": plan.cast,
            "files": in_order(files),
        },
        memory=found.memory,
        seconds=time.monotonic() - start,
        predictions=found.predictions,
        pictures=found.pictures,
        gpu=found.gpu,
        device_note=found.device_note,
        cast_cost=found.cast_cost,
        date=now(),
        command=command,
    )
