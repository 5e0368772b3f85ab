"""Removes the claims from a finished folder's manifest that this machine cannot confirm: authorship and verdicts."""

import shlex
from dataclasses import replace
from pathlib import Path

from streamconv.formats.safetensors import SINGLE_NAME
from streamconv.hub.names import published_model
from streamconv.logs import logger
from streamconv.output.manifest import MANIFEST_NAME, Manifest
from streamconv.output.verdict import has_passed
from streamconv.source.outputs import is_verdict_remembered, without_foreign_claims

_log = logger(__name__)
MAX_WORD_LENGTH = 300


def confirm_claims(manifest: Manifest, folder: Path) -> Manifest:
    """Return what `without_unconfirmed_claims` does, and log a warning about the claims that it removes."""
    if published_model(manifest) is not None and published_model(without_foreign_claims(manifest)) is None:
        _log.warning(
            "%s names the authors' file of %s as its source, but was not made or verified on this machine: it is "
            "pushed as another model. To push it as theirs, verify it first: `%s`",
            folder / MANIFEST_NAME, manifest.model, verify_command(folder, manifest),
        )  # fmt: skip
    elif has_passed(manifest) and not was_verified_here(manifest):
        _log.warning(
            "%s records that verification passed, but this machine did not verify these files, and the model card says "
            "so. To verify them first: `%s`",
            folder / MANIFEST_NAME, verify_command(folder, manifest),
        )  # fmt: skip
    return without_unconfirmed_claims(manifest)


def without_unconfirmed_claims(manifest: Manifest) -> Manifest:
    """Return the manifest without claims about authors that this machine cannot confirm.

    It also lacks a recorded verdict that other files passed: the folder can then be pushed only as unverified.
    """
    verdict = manifest.verification
    if verdict is not None and verdict.get("passed") is not False and not has_passed(manifest):
        verdict = None
    return replace(without_foreign_claims(manifest), verification=verdict)


def was_verified_here(manifest: Manifest) -> bool:
    """Return whether this machine reached the recorded verdict."""
    return is_verdict_remembered(manifest.verification or {})


def verify_command(folder: Path, manifest: Manifest) -> str:
    """Return the command that verifies a folder; SOURCE stands for a file whose place the manifest does not tell."""
    if manifest.model and all(file.published or file.found_in_cache for file in manifest.source.values()):
        return shlex.join(["streamconv", "verify", str(folder), _source_word(manifest.model)])
    in_folders = (SINGLE_NAME, "pytorch_model.bin")  # then the folder was the source, and the manifest does not name it
    sources = {
        role: _source_word(file.address or ("SOURCE" if file.file in in_folders else file.file))
        for role, file in manifest.source.items()
    }
    head = ["--head", sources["head"]] if "head" in sources else []
    return shlex.join(["streamconv", "verify", str(folder), sources.get("backbone", "SOURCE"), *head])


def _source_word(name: str) -> str:
    """Return a name from a manifest if it is safe in a command that the user may copy, and not an option; or SOURCE."""
    return "SOURCE" if name.startswith("-") or not name.isprintable() or len(name) > MAX_WORD_LENGTH else name
