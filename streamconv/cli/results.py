"""Prints the results of `run` and `verify`, each as soon as it is available, or all as JSON at the end."""

import sys
from collections.abc import Callable
from pathlib import Path

from streamconv.cli.messages import conversion_lines, verification_lines
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.terminal import print_json, print_lines
from streamconv.jobs.convert import Conversion
from streamconv.verification.result import Verification


class Results:
    """Prints each result as soon as it is available or, as JSON, all of them at the end."""

    def __init__(self, as_json: bool):
        self._as_json, self._is_finished = as_json, False
        self._conversion: Conversion | None = None
        self._verification: Verification | None = None
        self.published: str | None = None

    def printer(self, progress: ProgressReport) -> Callable[[Conversion | Verification], None]:
        def on_result(result: Conversion | Verification) -> None:
            progress.clear()
            if isinstance(result, Conversion):
                self._conversion, lines = result, conversion_lines(result)
            else:
                self._verification, lines = result, verification_lines(result)
                print_notes(result)
            if not self._as_json:
                print_lines(lines)

        return on_result

    def finish(self) -> None:
        """Print the remaining results. This is also called after an error, which may come after the work is done."""
        if self._is_finished or self._conversion is None:
            return
        self._is_finished = True
        if self._as_json:
            verification = self._verification.as_dict() if self._verification is not None else None
            print_json({**self._conversion.as_dict(), "verification": verification, "published": self.published})
            return
        if self._verification is None:
            print_lines(["not verified"])
        if self.published is not None:
            print_lines([f"published: {self.published}"])


def print_notes(verification: Verification) -> None:
    if verification.not_recorded:
        print(f"note: the result was not recorded in the folder: {verification.not_recorded}", file=sys.stderr)


def print_report_path(path: Path | None, as_json: bool) -> None:
    if path is not None and as_json:
        print(f"report: {path}", file=sys.stderr)
    elif path is not None:
        print_lines([f"report: {path}"])
