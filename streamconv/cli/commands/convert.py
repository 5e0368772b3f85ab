"""``streamconv convert``."""

from typing import Any

import streamconv
from streamconv import Conversion, ConversionOptions
from streamconv.cli.command import JSON, command, values_of
from streamconv.cli.consent import with_consent
from streamconv.cli.messages import conversion_lines
from streamconv.cli.options import CONVERSION_OPTIONS, DRY_RUN, YES, output_option, source_argument
from streamconv.cli.previews import show_preview
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.terminal import Printer


@command(source_argument(), output_option(), *CONVERSION_OPTIONS, DRY_RUN, YES, JSON)
def convert(printer: Printer, source: str, output: str, dry_run: bool, yes: bool, **given: Any) -> None:
    """Convert a checkpoint into a folder that transformers loads."""
    options = ConversionOptions(**values_of(CONVERSION_OPTIONS, given), allow_repeats=yes)
    if dry_run:
        show_preview(printer, source, output, options)
        return

    def job(options: ConversionOptions) -> Conversion:
        with ProgressReport(printer.is_quiet) as progress:
            return streamconv.convert(source, output, options, progress=progress)

    converted = with_consent(options, printer, job)
    printer.show(converted.as_dict(), conversion_lines(converted))
