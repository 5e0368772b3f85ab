"""What of a finished folder is pushed: its manifest's files, the manifest, and a model card, in one commit."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv.errors import OutputError, SourceError
from streamconv.files.local import read_small
from streamconv.hub.card import CARD_NAME, is_ours, make_card
from streamconv.hub.repository import Repository, require_digest
from streamconv.output.manifest import MANIFEST_NAME, read_manifest
from streamconv.progress import Progress, ignore_progress


def publish(folder: Path, repository: Repository, progress: Progress = ignore_progress) -> str:
    """Push a finished folder: what its manifest names, the manifest, and a model card, in one commit.

    A README.md in the folder is the card; otherwise one is made, and not kept there, unless the repository
    has one that someone else wrote. What the Hub has is not sent again.

    Returns:
        The commit's or pull request's address.

    Raises:
        OutputError: the folder is not finished, or its files are not as its manifest says.
        HubError: the Hub does not take it.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise OutputError(f"{folder} has no {MANIFEST_NAME}, so that it is not known what to push. Convert into it.")
    try:
        said = {str(name): (int(file["size"]), str(file["sha256"])) for name, file in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        said = {}
    if not said or any(Path(name).name != name for name in said):
        raise OutputError(f"{folder / MANIFEST_NAME} does not say what to push. Convert into another folder.")
    repository.refuse_others(said)
    small = {name: _small(folder / name, sha256) for name, (_, sha256) in said.items() if not _is_large(name)}
    large = {name: each for name, each in said.items() if _is_large(name)}
    small[MANIFEST_NAME] = _small(folder / MANIFEST_NAME)
    small |= card_files(folder, repository, manifest)
    for name, (size, _) in large.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise OutputError(f"{folder / name} is not as {MANIFEST_NAME} says. Convert again.")
    repository.create()
    for name, (_, sha256) in large.items():
        repository.upload(folder / name, name, sha256, progress)
    progress(f"committing to {repository.id}", 0, 1, "steps")
    return repository.commit(small, commit_message(manifest))


def commit_message(manifest: Mapping[str, Any]) -> str:
    return f"Add {manifest.get('model') or 'the model'}, converted by streamconv"


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _small(path: Path, sha256: str | None = None) -> bytes:
    try:
        data = read_small(path)
    except SourceError as error:
        raise OutputError(f"{error} It is to be pushed.") from error
    require_digest(path, hashlib.sha256(data).hexdigest(), sha256 or hashlib.sha256(data).hexdigest())
    return data


def card_files(folder: Path, repository: Repository, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """The model card by its name: the folder's own, or one that is made; none where someone else's is there.

    Raises:
        OutputError: the folder's cannot be read.
        HubError: the Hub does not say what is there.
    """
    if os.path.exists(folder / CARD_NAME):
        return {CARD_NAME: _small(folder / CARD_NAME)}
    there = repository.read_card()
    if there is not None and not is_ours(there):
        return {}
    return {CARD_NAME: make_card(manifest, repository.id).encode()}
