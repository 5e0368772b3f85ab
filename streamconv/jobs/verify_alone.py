"""Verifies a folder without its source: every file against the sha256 in the folder's own manifest."""

import sys
import time
from collections.abc import Iterable

from streamconv._version import __version__
from streamconv.errors import OutputError
from streamconv.files.address import Location
from streamconv.logs import logger
from streamconv.output.finished import find_edited
from streamconv.output.manifest import MANIFEST_NAME, Manifest, in_order
from streamconv.output.snapshot import Snapshot
from streamconv.output.verdict import has_passed, require_same
from streamconv.progress import Progress
from streamconv.source.outputs import without_foreign_claims
from streamconv.verification.result import Check, Verification
from streamconv.verification.structure import unexpected_weights
from streamconv.verification.unchanged import check_files

_log = logger(__name__)


def verify_alone(folder: Location, progress: Progress, command: str) -> Verification:
    """Compare a folder with its own manifest; see `verify`.

    Raises:
        OutputError: the folder has no manifest or was changed meanwhile, or a file in it cannot be read.
    """
    start, manifest = time.monotonic(), Manifest.read(folder)
    if manifest is None:
        raise OutputError(
            f"{folder} has no {MANIFEST_NAME} to check it against. Give the source: `streamconv verify DIR SOURCE`."
        )
    before = Snapshot.of(folder, manifest.files)
    found = find_edited(folder, manifest.files)
    edited = tuple(sorted(name for name, file in found.items() if file.sha256))  # the others are too large to be edits
    accepted = manifest.edited if has_passed(manifest) else {}
    written = {**manifest.files, **{name: file for name, file in accepted.items() if name in edited}}
    problems = check_files(folder, written, progress)
    problems = sorted([*problems, *unexpected_weights(folder, {*manifest.files})])
    require_same(before, manifest)
    proves, not_checked = f"every file is as it was written, according to {MANIFEST_NAME}", ""
    if edited:
        proves = f"every file is as it was written or, if it was edited later, verified, according to {MANIFEST_NAME}"
        not_checked = f"edited after the conversion: {', '.join(edited)}"
    files = Check("files", not problems, proves, tuple(problems), not_checked=not_checked)
    others = [
        Check(name, None, "no source was given") for name in ("bytes", "config", "load", "parity", "preprocessing")
    ]
    log_checks([files])
    return Verification(
        checks=(files.since(start), *others),
        device=None,
        reference=None,
        versions={"streamconv": __version__, "python": sys.version.split()[0]},
        source=without_foreign_claims(manifest).source,
        output={
            "model": manifest.model,
            "shaped_like": manifest.shaped_like,
            "architecture": manifest.architecture,
            "cast": manifest.cast,
            "files": in_order(written),
        },
        memory={},
        seconds=time.monotonic() - start,
        edited=edited,
        date=now(),
        command=command,
    )


def log_checks(checks: Iterable[Check]) -> None:
    """Log the results of all checks."""
    for check in checks:
        verdict = {True: "passed", False: "failed", None: "did not run"}[check.passed]
        _log.info("%s: %s: %s", check.name, verdict, "; ".join(check.problems) or check.proves)


def now() -> str:
    """Return the time in UTC, in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
