"""The result of --dry-run."""

from collections.abc import Iterator

from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.terminal import Printer
from streamconv.jobs.options import ConversionOptions, PushOptions, VerificationOptions
from streamconv.jobs.preview import Preview, preview


def show_preview(
    printer: Printer,
    source: str,
    output: str | None,
    options: ConversionOptions,
    verification: VerificationOptions | None = None,
    push: PushOptions | None = None,
) -> None:
    """Check a conversion without doing it, and show what it would do."""
    with ProgressReport(printer.is_quiet) as progress:
        checked = preview(source, output, options, verification, push, progress)
    printer.show(checked.as_dict(), preview_lines(checked))


def preview_lines(done: Preview) -> Iterator[str]:
    yield f"{done.plan.title}: dry run, nothing was written"
    for where, size in done.sources.items():
        yield f"  read      {where}, {size:,} bytes"
    for path, size in done.downloads.items():
        yield f"  download  {size:,} bytes to {path}"
    if done.replaced:
        yield f"  delete    {', '.join(done.replaced)} in {done.output}"
    if not done.files:
        yield f"  write     nothing: {done.output} holds this conversion already"
    else:
        resumed = f", {done.resumed_bytes:,} of them before an interruption" if done.resumed_bytes else ""
        yield f"  write     {sum(done.files.values()):,} bytes to {done.output}{resumed}: {', '.join(done.files)}"
    if done.verification is not None:
        compared = "with" if done.verification.parity else "without"
        yield f"  verify    on {done.verification.device}, {compared} a comparison of the models' outputs"
    if done.repository is not None:
        yield f"  push      to {done.repository}{'' if done.verification is None else ', if verification passes'}"
    yield from (f"  {note}" for note in done.plan.notes)
    yield from (f"  skipped: {each}" for each in done.plan.skipped)
