"""``streamconv run``."""

import sys
from typing import Any

import streamconv
from streamconv import ConversionOptions, RunResult
from streamconv.cli.command import JSON, Option, command, values_of
from streamconv.cli.consent import can_ask, confirmed, with_consent
from streamconv.cli.layout import print_wrapped
from streamconv.cli.options import (
    CONVERSION_OPTIONS,
    DEFAULT_MODEL,
    DRY_RUN,
    PUSH_OPTIONS,
    SEED,
    VERIFICATION_OPTIONS,
    YES,
    output_option,
    push_options,
    source_argument,
    verification_options,
)
from streamconv.cli.previews import show_preview
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.results import Results, print_report_path, target_shown_with
from streamconv.cli.terminal import Printer
from streamconv.errors import StreamconvError, UsageError
from streamconv.families.registry import find_model
from streamconv.hub.transport import configure_process
from streamconv.source.resolve import resolve_source

MODEL_NAME = Option("--model_name", metavar="NAME", group="Source", help="Same as SOURCE.")
SYNTHETIC = Option(
    "--synthetic", is_flag=True, group="Source", help="Generate a random checkpoint of the model and convert it."
)
NO_VERIFY = Option("--no-verify", is_flag=True, group="Verification", help="Convert only; do not verify.")


@command(
    source_argument(DEFAULT_MODEL, required=False), MODEL_NAME, SYNTHETIC, SEED,
    output_option("the published name", "--pytorch_dump_folder_path"),
    *CONVERSION_OPTIONS, DRY_RUN, NO_VERIFY, *VERIFICATION_OPTIONS, *PUSH_OPTIONS, YES, JSON,
)  # fmt: skip
def run(
    printer: Printer,
    source: str | None,
    model_name: str | None,
    synthetic: bool,
    seed: int,
    output: str | None,
    dry_run: bool,
    no_verify: bool,
    yes: bool,
    **given: Any,
) -> int:
    """Convert a checkpoint and verify the result."""
    if source is not None and model_name is not None:
        raise UsageError("SOURCE and --model_name mean the same thing. Give only one of them.")
    name = next((word for word in (source, model_name) if word is not None), DEFAULT_MODEL)
    conversion = ConversionOptions(**values_of(CONVERSION_OPTIONS, given), allow_repeats=yes)
    verification = verification_options(**values_of(VERIFICATION_OPTIONS, given))
    push = push_options(**values_of(PUSH_OPTIONS, given))
    if push is not None:
        configure_process()
    if dry_run:
        if synthetic:
            raise UsageError(
                "--dry-run cannot check a synthetic checkpoint, which only a real run generates. Omit --dry-run."
            )
        show_preview(printer, name, output, conversion, None if no_verify else verification, push)
        return 0
    if synthetic:
        if not printer.is_quiet:
            print_wrapped([f"generating a random checkpoint of {name}, seed {seed}"], sys.stderr)
    elif source is None and model_name is None:
        _announce_download(printer, conversion, is_confirmed=yes)
    results = Results(printer)

    def job(options: ConversionOptions) -> RunResult:
        with ProgressReport(printer.is_quiet) as progress:
            return streamconv.run(
                name,
                output,
                options,
                None if no_verify else verification,
                push,
                synthetic_seed=seed if synthetic else None,
                progress=progress,
                on_result=results.shown_with(progress),
                on_push=target_shown_with(printer, progress, is_conditional=not push.unverified if push else False),
            )

    try:
        done = with_consent(conversion, printer, job)
    except StreamconvError:
        results.finish()
        raise
    results.finish(done.published)
    printer.show(printer.results, [])
    if no_verify:
        return 0
    print_report_path(verification.report, printer)
    if not done.passed and push is not None and done.published is None:
        print_wrapped(["Not pushed, because verification failed. To push anyway, add --push-unverified."], sys.stderr)
    return 0 if done.passed else 1


def _announce_download(printer: Printer, options: ConversionOptions, *, is_confirmed: bool) -> None:
    """Ask before the default model's file is downloaded or, if nobody can answer, report the download.

    Raises:
        UsageError: the answer is no.
    """
    if not resolve_source(DEFAULT_MODEL, options.head).is_remote:
        return
    family, model = find_model(DEFAULT_MODEL)
    size = sum(info.nbytes for info in family.sources(model.dimensions).values())
    what = f"{DEFAULT_MODEL} ({size / 1e9:.1f} GB) from {model.backbone.url}"
    if is_confirmed or not can_ask():
        if not printer.is_quiet:
            print_wrapped([f"No SOURCE was given: downloading {what}"], sys.stderr)
        return
    if not confirmed(f"No SOURCE was given. Download {what}?"):
        raise UsageError("Nothing was downloaded. Give a SOURCE, or answer y.")
