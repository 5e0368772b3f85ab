"""Records the verdict of a verification in a folder's manifest, only for the files that were verified."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamconv.display import first_few
from streamconv.errors import OutputError
from streamconv.output.files import write_file
from streamconv.output.journal import JOURNAL_NAME
from streamconv.output.manifest import MANIFEST_NAME, Manifest, SourceFile, WrittenFile, is_weights
from streamconv.output.open_journal import locked_journal
from streamconv.output.snapshot import Snapshot


def record_verdict(
    before: Snapshot,
    manifest: Manifest | None,
    verdict: Mapping[str, Any],
    source: Mapping[str, SourceFile],
    files: Mapping[str, WrittenFile],
) -> str:
    """Record a verdict in the manifest of a folder, under the folder's lock.

    Args:
        before: The folder before any of its files was read.
        manifest: Its manifest at that time.
        verdict: `Verification.as_record`.
        source: The source that it was compared with.
        files: Its files as they were verified. Small ones that differ from what was written were edited.

    Returns:
        Why the verdict was not recorded; empty if it was.

    Raises:
        OutputError: the folder was changed after ``before``, so the verdict does not apply to its files.
    """
    folder = before.folder
    require_same(before, manifest)
    if not isinstance(folder, Path):
        return f"{folder} is in a store, where verification changes nothing."
    if manifest is None:
        return f"{folder} has no {MANIFEST_NAME}."
    if (reason := _why_another_source(manifest, verdict, source)) or (reason := _why_incomplete(manifest, verdict)):
        return reason
    try:
        with locked_journal(folder / JOURNAL_NAME, folder) as journal:
            if journal.contents.length:
                return f"another process has begun to convert into {folder}."
            try:
                now = require_same(before, manifest)
                small = {name: file for name, file in files.items() if name in manifest.files and not is_weights(name)}
                edited = {name: file for name, file in small.items() if file.sha256 != manifest.files[name].sha256}
                if now is not None:
                    now = replace(now, files={**now.files, **_newly_hashed(now, verdict, files)})
                    write_file(folder / MANIFEST_NAME, replace(now, verification=verdict, edited=edited).to_bytes())
            finally:
                journal.remove()
    except ChangedOutputError:
        raise
    except OutputError as error:  # another process writes to the folder, or this one may not
        return str(error)
    return ""


def _newly_hashed(
    manifest: Manifest, verdict: Mapping[str, Any], files: Mapping[str, WrittenFile]
) -> dict[str, WrittenFile]:
    """Return the files whose sha256 was not known when they were written, with it, if all checks passed."""
    unhashed = {name: file for name, file in manifest.files.items() if not file.sha256 and name in files}
    return (
        {name: replace(file, sha256=files[name].sha256) for name, file in unhashed.items()} if verdict["passed"] else {}
    )


class ChangedOutputError(OutputError):
    """A folder was changed while it was verified."""


def require_same(before: Snapshot, manifest: Manifest | None) -> Manifest | None:
    """Return the manifest as it is now: another verification may have recorded its verdict in it meanwhile.

    Raises:
        ChangedOutputError: something else was changed after ``before``.
    """
    now, changed = Manifest.read(before.folder), before.changed()
    if _without_verdict(now) != _without_verdict(manifest):
        changed.append(MANIFEST_NAME)
    if changed:
        raise ChangedOutputError(
            f"{before.folder} was changed while it was verified ({first_few(changed)}), so there is no verdict. "
            "Run the same command again."
        )
    return now


def _without_verdict(manifest: Manifest | None) -> Manifest | None:
    return replace(manifest, verification=None, edited={}) if manifest is not None else None


def _why_another_source(manifest: Manifest, verdict: Mapping[str, Any], source: Mapping[str, SourceFile]) -> str:
    """Return why ``source`` is not the one that the folder was made from; empty if it is.

    Without checksums, equal fingerprints only mean equal names and shapes, so the comparison of bytes decides.
    """
    has_same_bytes = any(check["name"] == "bytes" and check["passed"] for check in verdict["checks"])
    is_same = manifest.is_from(source) and (
        has_same_bytes or all(manifest.source[role].is_same(file) for role, file in source.items())
    )
    return "" if is_same else f"{MANIFEST_NAME} names another file as the source."


def _why_incomplete(manifest: Manifest, verdict: Mapping[str, Any]) -> str:
    """Return which checks only the recorded verdict on the same files has; empty if none, or if this one failed."""
    recorded = manifest.verification or {}
    if not verdict["passed"] or recorded_digests(recorded) != recorded_digests(verdict):
        return ""
    missing = sorted(_checks_that_ran(recorded) - _checks_that_ran(verdict))
    return f"the recorded one, on the same files, ran more checks ({', '.join(missing)})." if missing else ""


def recorded_digests(verdict: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of the files that a verdict is about, by name; empty if it does not list them."""
    try:
        return {str(name): str(file["sha256"]) for name, file in verdict["output"]["files"].items()}
    except (KeyError, TypeError, AttributeError):  # written by an older version, or altered
        return {}


def _checks_that_ran(verdict: Mapping[str, Any]) -> set[str]:
    try:
        return {str(check["name"]) for check in verdict["checks"] if check["passed"] is not None}
    except (KeyError, TypeError):
        return set()


def is_about_the_files(manifest: Manifest) -> bool:
    """Return whether the recorded verdict is about the files that the manifest lists, edits included."""
    digests = recorded_digests(manifest.verification or {})
    return all(digests.get(name) == file.sha256 for name, file in manifest.current_files.items())


def has_passed(manifest: Manifest) -> bool:
    """Return whether the recorded verdict is that exactly these files passed."""
    return bool((manifest.verification or {}).get("passed") is True and is_about_the_files(manifest))
