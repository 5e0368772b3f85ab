"""``streamconv push``."""

from typing import Any

import streamconv
from streamconv.cli.command import JSON, Argument, Option, command, values_of
from streamconv.cli.messages import published_lines
from streamconv.cli.options import FILE, REPOSITORY_OPTIONS, repository_options
from streamconv.cli.previews import push_preview_lines
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.results import target_shown_with
from streamconv.cli.terminal import Printer
from streamconv.hub.transport import configure_process
from streamconv.jobs.publish import preview_push

FOLDER = Argument("folder", metavar="DIR", type=FILE, group="Source", text="A folder that streamconv wrote.")
REPO = Argument(
    "repo", metavar="[REPO]", required=False, group="Hub",
    text="USER/NAME on the Hub, or NAME in your account.  [default: the published name, or DIR's]",
)  # fmt: skip
UNVERIFIED = Option(
    "--unverified", is_flag=True, group="Hub",
    help="Push even if verification failed or did not run; the model card says so.",
)  # fmt: skip
DRY_RUN = Option(
    "--dry-run", is_flag=True, group="Hub", help="Check everything and show what would be pushed; push nothing."
)


@command(FOLDER, REPO, *REPOSITORY_OPTIONS, UNVERIFIED, DRY_RUN, JSON)
def push(printer: Printer, folder: str, repo: str | None, unverified: bool, dry_run: bool, **given: Any) -> None:
    """Push a verified folder to the Hub in one commit, without converting again."""
    options = repository_options(repo, unverified, **values_of(REPOSITORY_OPTIONS, given))
    configure_process()
    with ProgressReport(printer.is_quiet) as progress:
        if dry_run:
            preview = preview_push(folder, options, progress)
        else:
            shown = target_shown_with(printer, progress)
            published = streamconv.publish(folder, options, progress=progress, on_push=shown)
    if dry_run:
        printer.show(preview.as_dict(), push_preview_lines(folder, preview))
    else:
        printer.show(published.as_dict(), published_lines(published))
