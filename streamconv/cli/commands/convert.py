"""``streamconv convert``."""

from pathlib import Path
from typing import Any

import click

import streamconv
from streamconv import Conversion, ConversionOptions
from streamconv.cli.cluster import cluster_client
from streamconv.cli.command import JSON, Option, command, values_of
from streamconv.cli.consent import with_consent
from streamconv.cli.messages import conversion_lines
from streamconv.cli.options import (
    CONVERSION_OPTIONS,
    DRY_RUN,
    FILE,
    NO_SERVER_SIDE_COPY,
    YES,
    output_option,
    source_argument,
)
from streamconv.cli.previews import show_preview
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.shown import shown_command
from streamconv.cli.terminal import Printer
from streamconv.errors import UsageError
from streamconv.jobs.output_location import output_location

PLAN = Option(
    "--plan", metavar="FILE", type=FILE, group="Source",
    help="Convert by a plan that `streamconv plan --save` wrote, instead of SOURCE and its options.",
)  # fmt: skip
PART = Option(
    "--part", metavar="I/N", group="Parallel",
    help="Write only part I of the N parts of --plan, such as 3/16. `streamconv finish` then joins them.",
)  # fmt: skip
SCHEDULER = Option(
    "--scheduler", metavar="ADDRESS", group="Parallel",
    help="Let the workers of a Dask scheduler write the files; its address is such as tcp://HOST:8786.",
)  # fmt: skip
WORKERS = Option(
    "--workers", metavar="N", type=click.IntRange(min=1), group="Parallel",
    help="Let N Dask workers on this machine write the files.",
)  # fmt: skip


@command(
    source_argument("that of --plan", required=False), PLAN, output_option(may_be_url=True), *CONVERSION_OPTIONS,
    NO_SERVER_SIDE_COPY, DRY_RUN, PART, SCHEDULER, WORKERS, YES, JSON,
)  # fmt: skip
def convert(
    printer: Printer,
    source: str | None,
    plan: str | None,
    output: str,
    no_server_side_copy: bool,
    dry_run: bool,
    part: str | None,
    scheduler: str | None,
    workers: int | None,
    yes: bool,
    **given: Any,
) -> None:
    """Convert a checkpoint into a folder that transformers loads."""
    options = ConversionOptions(
        **values_of(CONVERSION_OPTIONS, given), allow_repeats=yes, server_side_copy=not no_server_side_copy
    )
    _check_combination(source, plan, options, part, scheduler, workers)
    is_local = isinstance(output_location(output), Path)
    if dry_run and (plan is not None or scheduler is not None or workers is not None or not is_local):
        raise UsageError(
            "--dry-run needs SOURCE and a folder on this machine, without --scheduler and --workers. `streamconv plan "
            "SOURCE` shows what would be written."
        )
    if dry_run and source is not None:
        show_preview(printer, source, output, options)
        return

    def job(options: ConversionOptions) -> Conversion:
        with ProgressReport(printer.is_quiet) as progress, cluster_client(scheduler, workers, progress) as client:
            if plan is None:
                return streamconv.convert(source or "", output, options, client=client, progress=progress)
            repeats, force = options.allow_repeats, options.force
            return streamconv.convert_plan(
                plan, output, part=part, client=client, force=force, allow_repeats=repeats, progress=progress
            )

    converted = with_consent(options, printer, job)
    lines = [*conversion_lines(converted)]
    if converted.part is not None and plan is not None:
        lines += ["when all parts are written, run:", f"  {shown_command(['finish', output, '--plan', plan])}"]
    printer.show(converted.as_dict(), lines)


def _check_combination(
    source: str | None,
    plan: str | None,
    options: ConversionOptions,
    part: str | None,
    scheduler: str | None,
    workers: int | None,
) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError
    """
    is_parallel = scheduler is not None or workers is not None
    if source is None and plan is None:
        raise UsageError("There is no SOURCE. Give a checkpoint, or --plan FILE.")
    decided = ConversionOptions(force=options.force, allow_repeats=options.allow_repeats)
    if plan is not None and (source is not None or options != decided):
        raise UsageError("--plan decides what is read and written. Omit SOURCE and its options.")
    if part is not None and plan is None:
        raise UsageError(
            "--part needs --plan, so that all parts are those of one plan. Make it with `streamconv plan SOURCE --save "
            "FILE`, and give --plan FILE."
        )
    if part is not None and (is_parallel or options.force):
        raise UsageError("--part cannot be combined with --force, --scheduler or --workers. Omit one of them.")
    if scheduler is not None and workers is not None:
        raise UsageError(
            "--scheduler names a cluster, and --workers starts one on this machine. Give only one of them."
        )
