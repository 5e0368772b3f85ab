"""``streamconv verify``."""

from typing import Any

import streamconv
from streamconv import SourceOptions, VerificationOptions
from streamconv.cli.command import JSON, Argument, command, values_of
from streamconv.cli.options import FILE, SOURCE_OPTIONS, VERIFICATION_OPTIONS, source_argument, verification_options
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.results import print_notes, print_report_path
from streamconv.cli.terminal import Printer
from streamconv.cli.verification_messages import verification_lines
from streamconv.errors import UsageError

FOLDER = Argument(
    "folder", metavar="DIR", type=FILE, group="Source",
    text="A folder that streamconv wrote, or its URL in a store, such as s3://BUCKET/FOLDER.",
)  # fmt: skip


@command(
    FOLDER, source_argument("none; check only the folder's files", required=False),
    *SOURCE_OPTIONS, *VERIFICATION_OPTIONS, JSON,
)  # fmt: skip
def verify(printer: Printer, folder: str, source: str | None, report: str | None, **given: Any) -> int:
    """Verify a converted folder against its source: every byte, loading, and the output of every layer.

    Without SOURCE, each file is checked against its size and sha256 in the folder's streamconv.json.
    """
    source_options = SourceOptions(**values_of(SOURCE_OPTIONS, given))
    options = verification_options(**values_of(VERIFICATION_OPTIONS, {**given, "report": report}))
    if source is None and (source_options, options) != (SourceOptions(), VerificationOptions(report=report)):
        raise UsageError(
            "--head, --head-select, --select, --num-heads, --device, --image, --reference, --no-parity, --thorough and "
            "--stream apply only to a comparison with the source. Give SOURCE, too."
        )
    with ProgressReport(printer.is_quiet) as progress:
        verified = streamconv.verify(folder, source, options, source_options, progress=progress)
    printer.show(verified.as_dict(), verification_lines(verified), is_failure=not verified.passed)
    print_notes(verified)
    print_report_path(report, printer)
    return 0 if verified.passed else 1
