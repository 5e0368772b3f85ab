"""Converts a source into a folder, from beginning to end."""

import time
from contextlib import ExitStack
from dataclasses import replace

from streamconv.arguments import checked
from streamconv.files.address import Address, local_path
from streamconv.files.reader import Reader
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.jobs.conversion import Conversion, PreparedConversion
from streamconv.jobs.options import ConversionOptions, StrPath
from streamconv.jobs.output_location import default_folder, output_location, refuse_overwriting_source
from streamconv.jobs.prepare import PreparedSource, local_copy, prepared_source
from streamconv.jobs.recorded_plan import planned_conversion
from streamconv.jobs.shared_output import check_client, convert_shared, files_writer
from streamconv.output import plan_file
from streamconv.output.files import write_file
from streamconv.output.folder import OutputFolder, open_output_folder
from streamconv.output.manifest import MANIFEST_NAME, WrittenFile
from streamconv.output.writer import with_progress, write_shard
from streamconv.planning.plan import Plan
from streamconv.planning.repeats import refuse_repeats
from streamconv.progress import Progress, ignore_progress, job
from streamconv.source.outputs import remember_output, with_claims_of_all
from streamconv.source.resolve import default_output
from streamconv.tensors.checksums import RecordChecks


@checked
def plan(source: StrPath, options: ConversionOptions = ConversionOptions(), *, save: StrPath | None = None) -> Plan:
    """Plan what `convert` would write. No weights are read.

    For a remote .pth that is not saved, the offsets of weights are computed from torch's usual layout, to save
    requests. Such a plan is for inspection, not for execution elsewhere.

    Args:
        source: A model's name, or the path or URL of a checkpoint (https://, hf://, s3://, …).
        options: The options that `convert` will be called with.
        save: A file to write the plan to, for `convert_plan`. An earlier plan is replaced. It holds everything that
            the conversion needs except the weights: the source's files by absolute path or URL, size and version.

    Raises:
        UsageError, SourceError: as for `convert`; or the source's URL holds a secret, which is not saved.
        OutputError: the file cannot be written.
    """
    path = local_path(save, "plan") if save is not None else None
    if path is not None:
        plan_file.require_free(path)
    options = replace(options, stream=options.stream or save is not None)
    with prepared_source(source, options, ignore_progress, is_exact=save is not None) as prepared:
        if path is not None:
            write_file(path, plan_file.to_bytes(planned_conversion(prepared, options)))
        return prepared.plan


@job
def convert(
    source: StrPath,
    output: StrPath | None = None,
    options: ConversionOptions = ConversionOptions(),
    *,
    client: object = None,
    progress: Progress = ignore_progress,
) -> Conversion:
    """Convert a checkpoint into a folder that transformers loads.

    Args:
        source: A model's name, or the path or URL of a checkpoint (https://, hf://, s3://, …). A model's name means its
            file in torch.hub's cache or, if it is not there, its published URL.
        output: The folder to write to, or the URL of one in a store (s3://, gs://, …); by default, a folder with the
            name that the model was published under.
        options: How to read the source and what to write, such as another dtype or smaller files.
        client: A `distributed.Client`, whose workers write the weight files, several at a time. They need this package,
            and access to the source and the output.
        progress: Called with the number of bytes written to all weight files. An exception that it raises ends the job:
            see `Cancelled`.

    Raises:
        UsageError: the options contradict each other or the source, or something that they name does not exist.
        SourceError: the source cannot be read, is damaged, or is not a checkpoint of a known model.
        OutputError: the folder holds something else, or cannot be written.

    Errors are raised before anything is written, except those of failing disks and damaged sources. Even then, no
    incomplete file has its final name, and the same call resumes. If the folder already holds the same finished
    conversion, it is not changed.

    >>> done = streamconv.convert("dinov2_vits14_pretrain.pth", "dinov2-small")  # doctest: +SKIP
    >>> model = transformers.AutoModel.from_pretrained(done.output)  # doctest: +SKIP
    """
    check_client(client)
    output = output if output is not None else default_output(source)
    if client is not None or (output is not None and isinstance(output_location(output), Address)):
        return _convert_elsewhere(source, output, options, client, progress)
    with ExitStack() as stack:
        prepared = stack.enter_context(prepared_source(source, options, progress, output=output))
        return convert_prepared(prepared, output, options, progress, stack)[0]


def _convert_elsewhere(
    source: StrPath, output: StrPath | None, options: ConversionOptions, client: object, progress: Progress
) -> Conversion:
    """Convert into a store, or by the workers of ``client``. Remote sources are streamed."""
    options = replace(options, stream=True)
    with prepared_source(source, options, progress) as prepared:
        planned, reader = planned_conversion(prepared, options), prepared.source.reader
        location = output_location(output if output is not None else default_folder(prepared))
        refuse_overwriting_source(planned.plan, location, force=options.force)
        write = files_writer(planned, location, reader, client)
        return convert_shared(
            planned, location, write, progress, force=options.force, allow_repeats=options.allow_repeats
        )


def convert_prepared(
    prepared: PreparedSource,
    output: StrPath | None,
    options: ConversionOptions,
    progress: Progress,
    stack: ExitStack,
) -> tuple[Conversion, PreparedSource]:
    """Convert an open source.

    Returns:
        The result, and the source that verification should use. If the source had to be downloaded, this is the local
        copy, which stays open in ``stack``. Its plan has the labels that a finished folder was written with.
    """
    conversion = PreparedConversion.of(prepared, output, force=options.force)
    finished = conversion.find_finished() if prepared.source.has_checksums else None
    if finished is None:
        refuse_repeats(prepared.plan.shards, is_allowed=options.allow_repeats)
    if finished is None and prepared.source.is_remote and not options.stream:
        conversion.find_downloads(prepared.source)
        prepared = stack.enter_context(local_copy(prepared, progress))
        conversion = PreparedConversion.of(prepared, output, force=options.force)
    if finished is None:
        conversion = _recognised(conversion, prepared, progress)
        finished = conversion.find_finished()
    if finished is not None:
        return finished, replace(prepared, plan=finished.plan)
    source = prepared.source
    return write_folder(conversion, source.reader, progress, is_remote=source.is_remote), prepared


def _recognised(conversion: PreparedConversion, prepared: PreparedSource, progress: Progress) -> PreparedConversion:
    """Return the conversion with the source that the finished folder records, if the folder has the same bytes.

    Nothing else identifies a source without versions and checksums. The comparison reads the whole source.
    """
    manifest = conversion.find_unidentified()
    if manifest is None:
        return conversion
    from streamconv.verification.bytes import compare_with_source  # rarely needed

    same, _ = compare_with_source(conversion.folder, conversion.plan, prepared.source.reader, False, progress)
    return conversion.with_source_of(manifest) if same.passed else conversion


def write_folder(conversion: PreparedConversion, reader: Reader, progress: Progress, *, is_remote: bool) -> Conversion:
    """Write a conversion into its folder, or the rest of it.

    Args:
        reader: Opens the files of the source, or has them open.
        is_remote: Some of these files are on another machine.
    """
    start, earlier, replaced = time.monotonic(), conversion.find_earlier(), conversion.find_replaced()
    conversion = conversion.with_labels_of(earlier.manifest)
    plan = conversion.plan
    with open_output_folder(
        conversion.folder, conversion.provenance, plan.filenames, plan.size, force=conversion.force
    ) as work:
        written, resumed_bytes = _write_shards(plan, work, reader, progress)
        edited = conversion.find_earlier().edited  # again: writing may have taken an hour
        for name, data in plan.small_files.items():
            if name not in edited:
                work.write(name, data)
        recorded = {name: earlier.manifest.files[name] for name in edited} if earlier.manifest is not None else {}
        manifest = conversion.planned.manifest(written, recorded)
        if resumed_bytes:
            manifest = with_claims_of_all(manifest, (work.journal.contents.provenance, earlier.manifest))
        work.write(MANIFEST_NAME, manifest.to_bytes())
        if plan.index is not None and INDEX_NAME not in edited:
            work.write(INDEX_NAME, plan.index)  # last, because it makes the folder a model that can be loaded
        work.finish()
    if not resumed_bytes:  # what is resumed may come from elsewhere; verification compares it with the source
        remember_output(manifest.source, manifest.files, is_remote=is_remote)
    done = conversion.result(written, resumed_bytes, time.monotonic() - start)
    return replace(done, edited=edited, restored=earlier.lost, replaced=replaced)


def _write_shards(
    plan: Plan, folder: OutputFolder, reader: Reader, progress: Progress
) -> tuple[dict[str, WrittenFile], int]:
    """Write the weight files, or the rest of them after an interruption.

    Returns:
        The files by name, and how many of their bytes an interrupted run had written.
    """
    resumed_bytes, checks = 0, RecordChecks(reader)
    written = {}
    for shard, advance in with_progress(plan.shards, progress):
        written[shard.filename], kept = write_shard(shard, folder, reader, checks, advance)
        resumed_bytes += kept
    return written, resumed_bytes
