"""Prints the results of `run` and `verify`, each as soon as it is available, or all as JSON at the end."""

import sys
from collections.abc import Callable

from streamconv.cli.layout import Line, print_wrapped
from streamconv.cli.messages import conversion_lines, published_lines, target_text
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.terminal import Printer, print_lines
from streamconv.cli.verification_messages import verification_lines
from streamconv.hub.destination import PushTarget
from streamconv.jobs.conversion import Conversion
from streamconv.jobs.options import StrPath
from streamconv.jobs.publish import Published
from streamconv.verification.result import Verification


class Results:
    """Prints each result as soon as it is available or, as JSON, all of them at the end."""

    def __init__(self, printer: Printer):
        self._printer = printer
        self._verification: Verification | None = None

    def shown_with(self, progress: ProgressReport) -> Callable[[Conversion | Verification], None]:
        """Return a function that clears the bar of ``progress`` and shows a result."""

        def show(result: Conversion | Verification) -> None:
            progress.clear()
            results, is_failure = self._printer.results, False
            if isinstance(result, Conversion):
                results.update({**result.as_dict(), "verification": None, "published": None})
                lines = conversion_lines(result)
            else:
                self._verification, is_failure = result, not result.passed
                results["verification"] = result.as_dict()
                lines = verification_lines(result)
                print_notes(result)
            if not self._printer.as_json:
                self._printer.show({}, lines, is_failure=is_failure)

        return show

    def finish(self, published: Published | None = None) -> None:
        """Print the end of a job that succeeded or failed."""
        results = self._printer.results
        if results:
            results["published"] = published.url if published is not None else None
        if self._printer.as_json or self._printer.is_quiet or not results:
            return
        if self._verification is None:
            print_lines([Line("not verified", "", colour="yellow")])
        if published is not None:
            print_lines(published_lines(published))


def target_shown_with(
    printer: Printer, progress: ProgressReport, *, is_conditional: bool = False
) -> Callable[[PushTarget], None]:
    """Return a function that clears the bar of ``progress`` and reports where a push goes, and who will see it.

    ``is_conditional``: nothing is pushed unless verification passes.
    """

    def show(target: PushTarget) -> None:
        if not printer.is_quiet:
            progress.clear()
            condition = ", if verification passes" if is_conditional else ""
            print_wrapped([f"pushing to {target_text(target)}{condition}"], sys.stderr)

    return show


def print_notes(verification: Verification) -> None:
    notes = [verification.device_note]
    if verification.not_recorded:
        notes.append(f"the result was not recorded: {verification.not_recorded}")
    print_wrapped([Line("note: ", note, colour="yellow") for note in notes if note], sys.stderr)


def print_report_path(path: StrPath | None, printer: Printer) -> None:
    if path is not None and printer.as_json:
        print_wrapped([f"report: {path}"], sys.stderr)
    elif path is not None and not printer.is_quiet:
        print_lines([f"report: {path}"])
