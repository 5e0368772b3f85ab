"""``streamconv.json``, a finished folder's own word: what it was made from, and each file's size and sha256."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv.errors import OutputError, SourceError, SourceMissingError
from streamconv.files.local import read_small
from streamconv.output.files import write_file
from streamconv.output.journal import ResumePoint

MANIFEST_NAME = "streamconv.json"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Which of the files and decisions that make up a conversion are not the same in two of them.

    A finished one does not say when a source's owner, mode or name last changed ("changed_ns"): only
    who goes on with half a conversion must be as careful.
    """

    def parts(conversion: Mapping[str, Any], compared: Mapping[str, Any]) -> dict[str, object]:
        sources = {}
        for role, file in conversion["source"].items():
            is_said = "changed_ns" in compared["source"].get(role, {})
            version = [file.get(key) for key in ("modified_ns", "etag", "last_modified", "key", "opened_ns")]
            sources[role] = (file["fingerprint"], *version, file.get("changed_ns") if is_said else None)
        labels = conversion["labels"]
        # Where they come from by default can change with the network; that is no other conversion.
        named = labels["sha256"] if labels and not labels["is_default"] else "default"
        return {
            **sources,
            "plan (its names, its selection, its shard size, its dtype)": conversion["plan"],
            "list of labels": named,
        }

    try:
        mine, theirs = parts(one, other), parts(other, one)
    except (KeyError, TypeError, AttributeError):
        return ["description"]
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def is_of(manifest: Mapping[str, Any], source: Mapping[str, Any]) -> bool:
    """Whether a manifest says that its output was made from these files."""
    said = manifest.get("source")
    try:
        return said is not None and {r: s["fingerprint"] for r, s in said.items()} == {
            role: file["fingerprint"] for role, file in source.items()
        }
    except (KeyError, TypeError, AttributeError):
        return False


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What streamconv.json says, or None where there is none.

    Raises:
        OutputError: there is one that cannot be read.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(read_small(path))
    except SourceMissingError:
        return None
    except (SourceError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} cannot be read ({error}). Move it away, or write to another folder.") from error
    if not isinstance(manifest, dict):
        raise OutputError(f"{path} is not streamconv's. Move it away, or write to another folder.")
    return manifest


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _described(mark: ResumePoint) -> dict[str, Any]:
    overflow_count = {"overflow_count": mark.overflow_count} if mark.overflow_count else {}
    return {"size": mark.size, "sha256": mark.sha256, **overflow_count}


def record_verification(folder: Path, verification: dict[str, Any], source: dict[str, Any]) -> None:
    """Keep what a verification against ``source`` found in the folder's manifest, where it is of that source."""
    manifest = read_manifest(folder)
    if manifest is not None and is_of(manifest, source):
        write_file(folder / MANIFEST_NAME, manifest_bytes({**manifest, "verification": verification}))
