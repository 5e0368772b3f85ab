"""Converts by a saved plan: everything, or a part of the weight files on each of several machines, then the rest."""

from pathlib import Path

from streamconv.errors import UsageError
from streamconv.files.address import Address, local_path
from streamconv.files.inline import is_inline
from streamconv.files.reader import Reader
from streamconv.jobs.conversion import Conversion, PreparedConversion
from streamconv.jobs.convert import write_folder
from streamconv.jobs.options import StrPath
from streamconv.jobs.output_location import output_location, refuse_file, refuse_overwriting_source
from streamconv.jobs.shared_output import check_client, convert_shared, files_writer, finish_output
from streamconv.output import plan_file
from streamconv.planning.parts import Part
from streamconv.planning.repeats import refuse_repeats
from streamconv.progress import Progress, ignore_progress, job


@job
def convert_plan(
    plan: StrPath,
    output: StrPath,
    *,
    part: str | Part | None = None,
    client: object = None,
    force: bool = False,
    allow_repeats: bool = False,
    progress: Progress = ignore_progress,
) -> Conversion:
    """Convert exactly as a plan file says, or one part of it.

    Several processes, on any machines that have the same source and output, may each write a part at the same time;
    `finish` then makes the parts a model. A process that was interrupted is resumed by the same call. Remote sources
    are streamed.

    Args:
        plan: The file that `streamconv.plan` saved.
        output: The folder or the store's URL to write to.
        part: Write only these weight files: "3/16" is the third of sixteen parts of about equal size.
        client: A `distributed.Client`: its workers write the weight files.
        force: Replace the conversion that the output holds. A part never does.
        allow_repeats: As in `ConversionOptions`.
        progress: Called with the number of bytes written. An exception that it raises ends the job: see `Cancelled`.

    Raises:
        UsageError: the plan was changed, was made by another version of streamconv, or the arguments contradict each
            other.
        SourceError: the source cannot be read, or was changed since the plan was made.
        OutputError: the output holds something else, such as parts of another plan, or cannot be written.
    """
    check_client(client)
    chosen = Part.parse(part) if part is not None else None
    if chosen is not None and (force or client is not None):
        raise UsageError(
            f"{'force' if force else 'client'} and part cannot be combined: other processes may be writing to the same "
            "output. Omit one of them."
        )
    planned = plan_file.read(local_path(plan, "plan"))
    location = output_location(output)
    refuse_overwriting_source(planned.plan, location, force=force)
    with Reader(accepts_unversioned=planned.has_checksums) as reader:
        if isinstance(location, Path) and chosen is None and client is None:
            return _convert_folder(PreparedConversion(location, planned, force), reader, allow_repeats, progress)
        write = files_writer(planned, location, reader, client, chosen)
        return convert_shared(planned, location, write, progress, part=chosen, force=force, allow_repeats=allow_repeats)


def _convert_folder(
    conversion: PreparedConversion, reader: Reader, allow_repeats: bool, progress: Progress
) -> Conversion:
    """Convert into a folder that only this process writes."""
    if (finished := conversion.find_finished()) is not None:
        return finished
    refuse_repeats(conversion.plan.shards, is_allowed=allow_repeats)
    is_remote = any(isinstance(file.location, Address) for file in conversion.plan.sources() if not is_inline(file))
    return write_folder(conversion, reader, progress, is_remote=is_remote)


@job
def finish(output: StrPath, plan: StrPath, *, progress: Progress = ignore_progress) -> Conversion:
    """Finish an output whose parts are complete: check them, and write what makes them a model.

    Each weight file must have its recorded size and, in a folder, its recorded sha256, so all files are read. Then the
    small files, the manifest and, last, the index are written. The source is not read.

    Args:
        output: The folder or the store's URL that the parts were written to.
        plan: The plan file that the parts were written by.
        progress: Called with the number of bytes checked.

    Raises:
        UsageError: as for `convert_plan`.
        OutputError: a part is missing, or a file has changed; the message names all of them.
    """
    planned = plan_file.read(local_path(plan, "plan"))
    location = output_location(output)
    if isinstance(location, Path):
        refuse_file(location)
    return finish_output(planned, location, progress)
