"""Publishes a finished folder on the Hub."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import OutputError, SourceError, UsageError
from streamconv.families.base import Model
from streamconv.families.registry import all_families
from streamconv.files.address import local_path
from streamconv.files.local import read_small
from streamconv.hub.card import CARD_NAME, is_ours, make_card
from streamconv.hub.repository import Repository
from streamconv.jobs.options import PushOptions, StrPath
from streamconv.output.manifest import MANIFEST_NAME, Manifest
from streamconv.progress import Progress, ignore_progress, job

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A published model: its repository, "user/name", and the URL of the commit or pull request."""

    repository: str
    url: str


@job
def publish(folder: StrPath, push: PushOptions = PushOptions(), *, progress: Progress = ignore_progress) -> Published:
    """Publish a finished folder on the Hub, with the token of the user who is logged in.

    Args:
        folder: The folder that `convert` wrote.
        push: The repository; by default, one in the user's account with the name that the model was published under.
        progress: Called before each file is uploaded, with its name as the step. An exception that it raises ends the
            job, and the same call uploads only what the Hub lacks: see `Cancelled`.

    huggingface_hub's settings in this process are used and not changed: its client, log level and progress bars
    (HF_HUB_DISABLE_PROGRESS_BARS=1 disables them). Its default client waits forever for a response;
    `huggingface_hub.set_client_factory` can set one with a timeout.

    Raises:
        UsageError: the model was not verified, or failed verification, and ``push.unverified`` is not set; or the
            repository has no name.
        OutputError: the folder is not finished, or its files do not match its manifest.
        HubError: there is no token, or the Hub does not accept the model.
    """
    path = local_path(folder, "folder")
    if not os.path.isdir(path):
        raise OutputError(f"{path} is not a folder. Give a folder that streamconv wrote.")
    manifest = _read_manifest(path)
    if not push.unverified and not (manifest.verification or {}).get("passed"):
        raise UsageError(f"{folder} has not passed verification. Verify it first: `streamconv verify DIR SOURCE`.")
    repository = open_repository(push, _published_model(manifest))
    return publish_folder(path, repository, progress)


def open_repository(push: PushOptions, published: Model | None) -> Repository:
    """Open the repository to push to. Its default name is the one that the model was published under.

    Raises:
        UsageError, HubError: see `Repository`. Nothing was changed on the Hub.
    """
    return Repository(push.destination, published.published_name if published is not None else None)


def _published_model(manifest: Manifest) -> Model | None:
    """Return the published model that a folder was converted from."""
    models = (model for family in all_families() for model in family.models)
    return next((model for model in models if model.name == manifest.model), None)


def publish_folder(folder: Path, repository: Repository, progress: Progress = ignore_progress) -> Published:
    """Push a finished folder in one commit: the files that its manifest names, the manifest, and a model card.

    If the folder has a README.md, that is the card. Otherwise one is generated, but not kept in the folder, unless the
    repository has a card that someone else wrote. Files that the Hub already has are not uploaded again.

    Raises:
        OutputError: the folder is not finished, or its files do not match its manifest.
        HubError: the Hub does not accept it.
    """
    manifest = _read_manifest(folder)
    repository.refuse_others(manifest.files)
    files = manifest.current_files
    small = {name: _small(folder / name, file.sha256) for name, file in files.items() if not _is_large(name)}
    large = {name: file for name, file in files.items() if _is_large(name)}
    small[MANIFEST_NAME] = _small(folder / MANIFEST_NAME)
    small |= card_files(folder, repository, manifest)
    for name, file in large.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != file.size:
            raise OutputError(f"{folder / name} does not match {MANIFEST_NAME}. Convert again.")
    repository.create()
    for name, file in large.items():
        repository.upload(folder / name, name, file.sha256, progress)
        _log.info("uploaded %s to %s", name, repository.id)
    progress(f"committing to {repository.id}", 0, 1, "steps")
    url = repository.commit(small, commit_message(manifest))
    _log.info("committed %s", url)
    return Published(repository.id, url)


def _read_manifest(folder: Path) -> Manifest:
    manifest = Manifest.read(folder)
    if manifest is None:
        raise OutputError(f"{folder} has no {MANIFEST_NAME}, which lists the files to push. Convert the model first.")
    return manifest


def commit_message(manifest: Manifest) -> str:
    return f"Add {manifest.model or 'the model'}, converted by streamconv"


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _small(path: Path, sha256: str | None = None) -> bytes:
    try:
        data = read_small(path)
    except SourceError as error:
        raise OutputError(f"{error} It is one of the files to push.") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise OutputError(
            f"{path} was changed after it was written or verified. Verify it first, which records the change: "
            "`streamconv verify DIR SOURCE`."
        )
    return data


def card_files(folder: Path, repository: Repository, manifest: Manifest) -> dict[str, bytes]:
    """Return the model card by file name: the folder's own, or a generated one.

    The result is empty if the folder has none and the repository has one that someone else wrote.

    Raises:
        OutputError: the folder's card cannot be read.
        HubError: the repository's card cannot be read.
    """
    if os.path.exists(folder / CARD_NAME):
        return {CARD_NAME: _small(folder / CARD_NAME)}
    there = repository.read_card()
    if there is not None and not is_ours(there):
        return {}
    return {CARD_NAME: make_card(manifest, repository.id).encode()}
