"""Writes outputs that several processes may write: some of the weight files, or all, and then the rest."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from streamconv.arguments import shown_value
from streamconv.display import first_few, first_lines
from streamconv.errors import SHOWN_PROBLEMS, OutputError, UsageError
from streamconv.files.address import Location
from streamconv.files.reader import Reader
from streamconv.jobs.conversion import Conversion
from streamconv.output.fallbacks import lacks_of
from streamconv.output.manifest import WrittenFile
from streamconv.output.open_shared import open_shared_output
from streamconv.output.planned import PlannedConversion
from streamconv.output.shared import FileState, SharedOutput
from streamconv.output.writer import with_progress
from streamconv.planning.parts import Part, shards_of
from streamconv.planning.repeats import refuse_repeats
from streamconv.planning.shards import Shard
from streamconv.progress import Progress
from streamconv.tensors.checksums import RecordChecks
from streamconv.verification.unchanged import check_files

SHOWN_FILES_OF_PART = 3

WriteFiles = Callable[[Sequence[Shard], Progress], tuple[dict[str, WrittenFile], int]]
"""Writes weight files, in this process or in others: see `write_files`."""


def write_files(
    planned: PlannedConversion,
    output: SharedOutput,
    reader: Reader,
    shards: Sequence[Shard],
    progress: Progress,
    part: str = "",
) -> tuple[dict[str, WrittenFile], int]:
    """Write weight files, one after the other, or the rest of them after an interruption.

    Args:
        reader: Opens the files of the source, or has them open.
        part: The part of the plan that they are, such as "3/16"; empty if this process was given no part.

    Returns:
        The files by name, and how many of their bytes interrupted processes had written.
    """
    kept_bytes, checks = 0, RecordChecks(reader)
    written = {}
    for shard, advance in with_progress(shards, progress):
        written[shard.filename], kept = output.write(planned, shard, reader, checks, advance, part)
        kept_bytes += kept
    return written, kept_bytes


def check_client(client: object) -> None:
    """Check the type of an argument, without importing the package if nobody has.

    Raises:
        UsageError: it is neither None nor a `distributed.Client`.
    """
    distributed = sys.modules.get("distributed")
    if client is not None and (distributed is None or not isinstance(client, distributed.Client)):
        raise UsageError(f"client must be a distributed.Client or None, not {shown_value(client)}.")


def files_writer(
    planned: PlannedConversion, location: Location, reader: Reader, client: object = None, part: Part | None = None
) -> WriteFiles:
    """Return what writes weight files: this process or, with a ``client`` (`distributed.Client`), its workers."""
    if client is not None:
        from streamconv.jobs.dask.dispatch import write_files_on  # with a package that only this needs

        return partial(write_files_on, client, planned, location)
    return partial(write_files, planned, open_shared_output(location), reader, part=str(part or ""))


def convert_shared(
    planned: PlannedConversion,
    location: Location,
    write: WriteFiles,
    progress: Progress,
    *,
    part: Part | None = None,
    force: bool = False,
    allow_repeats: bool = False,
) -> Conversion:
    """Write an output, or one ``part`` of its weight files, with ``write``. A finished output is not changed.

    Raises:
        SourceError, OutputError: the same call resumes.
    """
    output = open_shared_output(location)
    shards = planned.plan.shards if part is None else shards_of(planned.plan.shards, part)
    if not force and (manifest := output.finished(planned)) is not None:
        written = {shard.filename: manifest.files[shard.filename] for shard in shards}
        return _result(planned, location, written, part=part, was_finished=True)
    refuse_repeats(planned.plan.shards, is_allowed=allow_repeats)
    start = time.monotonic()
    output.begin(planned, force=force)
    written, kept_bytes = write(shards, progress)
    if part is None:
        output.finish(planned, planned.manifest(written))
    return _result(planned, location, written, kept_bytes, time.monotonic() - start, part=part)


def finish_output(planned: PlannedConversion, location: Location, progress: Progress) -> Conversion:
    """Check that all weight files are there, and write the small files, the manifest and the index.

    Raises:
        OutputError: files are missing or incomplete, or have changed since they were written. The message names them
            and the parts that they belong to.
    """
    start, output = time.monotonic(), open_shared_output(location)
    if (manifest := output.finished(planned)) is not None:
        written = {shard.filename: manifest.files[shard.filename] for shard in planned.plan.shards}
        return _result(planned, location, written, was_finished=True)
    states = output.states(planned)
    if not any(state.size or state.part for state in states.values()):
        raise OutputError(
            f"{location} holds none of the {len(states):,} weight files of the plan. Write them with `streamconv "
            "convert --plan FILE --part I/N`, or give the folder that they were written to."
        )
    if missing := _missing(planned, states):
        raise OutputError(
            f"{location} is not complete. {'; '.join(first_lines(missing, SHOWN_PROBLEMS, len(missing)))}. Write "
            "what is missing with the command that wrote the others, then finish."
        )
    written = {name: state.written for name, state in states.items() if state.written is not None}
    if isinstance(location, Path) and (problems := check_files(location, written, progress)):
        raise OutputError(
            f"{'; '.join(first_lines(problems, SHOWN_PROBLEMS, len(problems)))}. Delete these files, write "
            "their parts again, then finish."
        )
    output.finish(planned, planned.manifest(written))
    return _result(planned, location, written, 0, time.monotonic() - start)


def _missing(planned: PlannedConversion, states: Mapping[str, FileState]) -> list[str]:
    """Describe the weight files that are not complete, by parts if the others tell how many parts there are."""
    missing = [shard for shard in planned.plan.shards if states[shard.filename].written is None]
    counts = {state.part.partition("/")[2] for state in states.values() if state.part}
    if len(counts) != 1 or not missing:
        return [_lack(shard, states[shard.filename]) for shard in missing]
    count, found = int(counts.pop()), []
    for part in (Part(number, count) for number in range(1, count + 1)):
        lacks = [_lack(each, states[each.filename]) for each in shards_of(planned.plan.shards, part) if each in missing]
        found += [f"part {part}: {first_few(lacks, SHOWN_FILES_OF_PART)}"] if lacks else []
    return found


def _lack(shard: Shard, state: FileState) -> str:
    return (
        f"{shard.filename} has {state.size:,} of {shard.size:,} bytes" if state.size else f"{shard.filename} is missing"
    )


def _result(
    planned: PlannedConversion,
    location: Location,
    written: Mapping[str, WrittenFile],
    kept_bytes: int = 0,
    seconds: float = 0.0,
    *,
    part: Part | None = None,
    was_finished: bool = False,
) -> Conversion:
    return Conversion(
        output=location if isinstance(location, Path) else str(location),
        plan=planned.plan,
        shards={name: file.sha256 for name, file in written.items()},
        was_finished=was_finished,
        resumed_bytes=kept_bytes,
        is_crc_checked=planned.has_checksums,
        labels_from=planned.labels_from,
        overflow_count=sum(file.overflow_count for file in written.values()),
        seconds=seconds,
        disk_notes=lacks_of(location) if isinstance(location, Path) else (),
        part=part,
    )
