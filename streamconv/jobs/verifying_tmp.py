"""Verification as `run` and `verify` are told of it: checked ahead, carried out, kept in the manifest, reported."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamconv
from streamconv.cli.progress_bar import ProgressReport
from streamconv.errors import OutputError
from streamconv.jobs.convert_to_hub import Verify
from streamconv.jobs.verify import verify_uploaded
from streamconv.output.files import write_file
from streamconv.output.manifest import record_verification
from streamconv.planning.plan import Plan
from streamconv.progress import Progress
from streamconv.source.open import OpenSource
from streamconv.verification.preflight import check_arguments, check_report
from streamconv.verification.result import Verification


@dataclass(frozen=True)
class Verifying:
    """The options of the command line; ``parity`` and ``stream`` as `streamconv.verify` has them."""

    device: str
    image: str | None
    reference: str
    parity: bool
    stream: bool
    report: Path | None

    def check_ahead(self) -> None:
        """Refuse what cannot be done, before anything is converted.

        Raises:
            UsageError, OutputError
        """
        if self.report is not None:
            check_report(self.report)
        check_arguments(self.device, self.image, self.reference)

    def verify(self, folder: Path, source: str | None, **said: Any) -> tuple[Verification, str | None]:
        """What was found, and why it is not kept in the folder's manifest, where it should be and is not.

        ``said`` of the source is its head and the like, as `streamconv.verify` has them.
        """
        with ProgressReport() as progress:
            found = streamconv.verify(folder, source, stream=self.stream, progress=progress, **said, **self._common)
        if source is None:
            return found, None  # the manifest keeps what was found against the source
        try:
            # The pictures are for JSON and the report: the manifest stays a text to read.
            record_verification(folder, {**found.as_dict(), "pictures": {}}, dict(found.source))
        except OutputError as error:
            return found, str(error)
        return found, None

    def of_what_was_sent(self, progress: Progress) -> Verify:
        """The same for `relay`."""

        def verify(plan: Plan, source: OpenSource, manifest: Mapping[str, Any], outline: Path) -> Verification:
            return verify_uploaded(plan, source, manifest, outline, progress=progress, **self._common)

        return verify

    def write_report(self, found: Verification) -> None:
        if self.report is not None:
            from streamconv.verification.report import render  # with what it imports, only for those who want one

            write_file(self.report, render(found.as_dict()).encode())

    @property
    def _common(self) -> dict[str, Any]:
        return {"device": self.device, "image": self.image, "reference": self.reference, "parity": self.parity}
