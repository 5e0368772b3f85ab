"""``streamconv finish``."""

import streamconv
from streamconv.cli.command import JSON, Argument, Option, command
from streamconv.cli.messages import finished_lines
from streamconv.cli.options import FILE
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.terminal import Printer

OUTPUT = Argument(
    "output", metavar="DIR", type=FILE, group="Output",
    text="The folder, or the URL in a store, that the parts were written to.",
)  # fmt: skip
PLAN = Option(
    "--plan", metavar="FILE", type=FILE, required=True, group="Source", help="The plan that the parts were written by."
)


@command(OUTPUT, PLAN, JSON)
def finish(printer: Printer, output: str, plan: str) -> None:
    """Check that all parts of a plan were written, and join them into a model."""
    with ProgressReport(printer.is_quiet) as progress:
        finished = streamconv.finish(output, plan, progress=progress)
    printer.show(finished.as_dict(), finished_lines(finished))
