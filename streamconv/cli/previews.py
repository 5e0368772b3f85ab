"""The result of --dry-run."""

from collections.abc import Iterator

from streamconv.cli.layout import Line
from streamconv.cli.messages import few, remark_lines, target_text
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.terminal import Printer
from streamconv.cli.units import size
from streamconv.jobs.options import ConversionOptions, PushOptions, VerificationOptions
from streamconv.jobs.preview import Preview, preview
from streamconv.jobs.publish import PushPreview


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


def preview_lines(done: Preview) -> Iterator[Line | str]:
    yield f"{done.plan.title}: dry run, nothing was written"
    yield from (_row("read", f"{where}, {size(count)}") for where, count in done.sources.items())
    yield from (_row("download", f"{size(count)} to {path}") for path, count in done.downloads.items())
    if done.replaced:
        yield _row("delete", f"{', '.join(done.replaced)} in {done.output}")
    for name in done.lost_edits:
        yield _row("", f"{name} was changed after the conversion; the changes would be lost")
    for name in done.edited:
        yield _row("keep", f"{name}, which was changed after the conversion; --force would replace it")
    if not done.files:
        yield _row("write", f"nothing: {done.output} already holds this conversion")
    else:
        resumed = f", {size(done.resumed_bytes)} of it before an interruption" if done.resumed_bytes else ""
        yield _row("write", f"{size(sum(done.files.values()))} to {done.output}{resumed}")
        names = [f"{name}{f' is {done.restored[name]}' if name in done.restored else ''}" for name in done.files]
        yield from few([f"{'':12}{name}" for name in names], "files", "--json")
    if done.verification is not None:
        comparing = "comparing" if done.verification.parity else "without comparing"
        native = ", also at the native size" if done.verification.parity and done.verification.thorough else ""
        yield _row("verify", f"on device {done.verification.device}, {comparing} the models' outputs{native}")
    if done.push is not None:
        yield _row("push", f"to {target_text(done.push)}{'' if done.unverified else ', if verification passes'}")
    yield from remark_lines(done.plan)


def push_preview_lines(folder: str, done: PushPreview) -> Iterator[Line | str]:
    yield f"{folder}: dry run, nothing was pushed"
    yield _row("push", f"to {target_text(done.target)}")
    new = {name: count for name, count in done.files.items() if name not in done.present}
    if not new:
        yield _row("files", "none: the repository already has all of them")
        return
    there = f", beside {len(done.present)} that are already there" if done.present else ""
    yield _row("files", f"{size(sum(new.values()))}{there}")
    yield from few([f"{'':12}{name}  {size(count)}" for name, count in new.items()], "files", "--json")


def _row(name: str, text: str) -> Line:
    return Line(f"  {name:8}  ", text)
