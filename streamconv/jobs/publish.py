"""Publishes a finished folder on the Hub."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.display import first_few
from streamconv.errors import OutputError, SourceError, UsageError
from streamconv.files.address import COPY_FOLDER, local_path
from streamconv.files.local import exists, read_small
from streamconv.hub.card import CARD_NAME, is_ours, kept_metadata, make_card
from streamconv.hub.card_check import check_card
from streamconv.hub.checks import LargeFile, hashed
from streamconv.hub.destination import PushTarget
from streamconv.hub.names import published_model
from streamconv.hub.repository import Repository
from streamconv.jobs.claims import confirm_claims, verify_command, was_verified_here, without_unconfirmed_claims
from streamconv.jobs.finished_output import require_finished
from streamconv.jobs.options import PushOptions, StrPath
from streamconv.jobs.push_target import OnPush, ignore_target, open_repository
from streamconv.logs import logger
from streamconv.output.manifest import MANIFEST_NAME, Manifest, is_weights
from streamconv.output.readable import reading_output
from streamconv.output.verdict import has_passed
from streamconv.progress import Progress, ignore_progress, job

_log = logger(__name__)


@dataclass(frozen=True)
class Published:
    """A published model: its repository, "user/name", and the URL of the commit or pull request.

    ``private`` is the repository's visibility. ``was_published``: it had all of these files already, and no commit was
    made.
    """

    repository: str
    url: str
    private: bool = False
    was_published: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {**vars(self)}


@dataclass(frozen=True)
class PushPreview:
    """The effects that `publish` would have. ``files`` are the sizes in bytes of the files of the commit, by name.

    ``present`` are those that the repository already has, with the same contents.
    """

    target: PushTarget
    files: Mapping[str, int]
    present: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the preview for JSON."""
        files = [{"file": name, "bytes": size, "is_present": name in self.present} for name, size in self.files.items()]
        return {"dry_run": True, "push": self.target.as_dict(), "files": files}


@job
def publish(
    folder: StrPath,
    push: PushOptions = PushOptions(),
    *,
    progress: Progress = ignore_progress,
    on_push: OnPush = ignore_target,
) -> Published:
    """Publish a finished folder on the Hub, with the token of the user who is logged in.

    Args:
        folder: The folder that `convert` or `run` wrote, and that passed verification.
        push: The repository, and what its model card says; see `PushOptions`.
        progress: Called before each file is read or uploaded, with its name as the step. An exception that it raises
            ends the job, and the same call uploads only what the Hub lacks: see `Cancelled`.
        on_push: Called with the repository before anything is uploaded. An exception that it raises ends the job, too.

    huggingface_hub's settings in this process are used and not changed: its client, log level and progress bars
    (HF_HUB_DISABLE_PROGRESS_BARS=1 disables them). Its default client waits forever for a response;
    `huggingface_hub.set_client_factory` can set one with a timeout.

    Raises:
        UsageError: the model was not verified, or failed verification, and ``push.unverified`` is not set; or the
            repository has no name, or the licence cannot be used.
        OutputError: the folder is not finished, or its files do not match its manifest.
        HubError: there is no token, or the Hub does not accept the model.
    """
    path = local_path(folder, "folder", COPY_FOLDER)
    manifest = _read_verified(path, push)
    repository = open_repository(push, path, confirm_claims(manifest, path))
    on_push(repository.target)
    return publish_folder(path, repository, progress, push)


def preview_push(folder: StrPath, push: PushOptions, progress: Progress = ignore_progress) -> PushPreview:
    """Check what `publish` would do, and change nothing on the Hub.

    Raises:
        UsageError, OutputError, HubError: `publish` would be refused with the same error.
    """
    path = local_path(folder, "folder", COPY_FOLDER)
    manifest = _read_verified(path, push)
    confirmed = confirm_claims(manifest, path)
    repository = open_repository(push, path, confirmed)
    repository.refuse_others(manifest.files)
    small, large = _read_files(path, manifest, progress)
    small |= card_files(path, repository, confirmed, push, was_verified_here=was_verified_here(manifest))
    sizes = {name: file.operation.upload_info.size for name, file in large.items()}
    sizes |= {name: len(data) for name, data in small.items()}
    return PushPreview(
        repository.target, sizes, tuple(repository.present(small, [file.operation for file in large.values()]))
    )


def publish_folder(
    folder: Path, repository: Repository, progress: Progress = ignore_progress, push: PushOptions = PushOptions()
) -> Published:
    """Push a finished folder in one commit: the files that its manifest names, the manifest, and a model card.

    If the folder has a README.md, that is the card. Otherwise one is generated, but not kept in the folder, unless the
    repository has a card that someone else wrote. Files that the Hub already has are not uploaded again.

    Raises:
        UsageError: the folder records no verdict that these files passed, and ``push.unverified`` is not set; or the
            Hub does not accept the card.
        OutputError: the folder is not finished, or its files do not match its manifest or change meanwhile.
        HubError: the Hub does not accept it.
    """
    manifest = _read_verified(folder, push)
    repository.refuse_others(manifest.files)
    small, large = _read_files(folder, manifest, progress)
    confirmed = without_unconfirmed_claims(manifest)
    small |= card_files(folder, repository, confirmed, push, was_verified_here=was_verified_here(manifest))
    repository.create()
    for name, file in large.items():
        repository.send(file, progress)
        _log.info("uploaded %s to %s", name, repository.id)
    return commit(repository, small, confirmed, progress)


def commit(repository: Repository, small: Mapping[str, bytes], manifest: Manifest, progress: Progress) -> Published:
    """Commit the small files together with the large ones that were uploaded.

    ``manifest`` has confirmed claims only: the commit's title names a model if the source is its authors' own.
    """
    progress(f"committing to {repository.id}", 0, 1, "steps")
    found = published_model(manifest)
    made = repository.commit(small, f"Add {found[1].name if found else 'the model'}, converted by streamconv")
    _log.info("committed %s" if made.is_new else "%s has all files already", made.url)
    return Published(repository.id, made.url, made.private, was_published=not made.is_new)


def _read_verified(folder: Path, push: PushOptions) -> Manifest:
    manifest = _read_manifest(folder)
    verification = manifest.verification
    if push.unverified or has_passed(manifest):
        return manifest
    if verification is None:
        state = "has not been verified"
    elif not verification.get("passed"):
        state = "failed verification"
    else:  # recorded by an older version, without files, or copied from another folder
        state = "has a recorded verification, but of other files"
    raise UsageError(f"{folder} {state}. Verify it first: `{verify_command(folder, manifest)}`.")


def _read_manifest(folder: Path) -> Manifest:
    require_finished(folder)
    manifest = Manifest.read(folder)
    if manifest is None:
        raise OutputError(f"{folder} has no {MANIFEST_NAME}, which lists the files to push. Convert the model first.")
    return manifest


def _read_files(folder: Path, manifest: Manifest, progress: Progress) -> tuple[dict[str, bytes], dict[str, LargeFile]]:
    """Return the contents of the small files, and the weight files with their sha256.

    Raises:
        OutputError: files are missing, cannot be read, or are not as they were verified.
    """
    small, large = {}, {}
    if unhashed := [name for name, file in manifest.current_files.items() if not file.sha256]:
        raise OutputError(
            f"{folder / MANIFEST_NAME} has no sha256 of {first_few(unhashed)}, which a store copied. Verify the folder "
            f"first, which records it: `{verify_command(folder, manifest)}`."
        )
    with reading_output():
        present = [name for name in manifest.current_files if exists(folder / name)]
    for name in present:
        if is_weights(name):
            large[name] = hashed(folder / name, name, progress)
        else:
            small[name] = _small(folder / name)
    digests = {name: file.sha256 for name, file in large.items()}
    digests |= {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    changed = [name for name in present if digests[name] != manifest.current_files[name].sha256]
    missing = [name for name in manifest.current_files if name not in present]
    if changed or missing:
        found = [f"{', '.join(changed)} was changed after it was written or verified"] if changed else []
        found += [f"{', '.join(missing)} is missing"] if missing else []
        fix = f"Verify the folder again, which records edits: `{verify_command(folder, manifest)}`."
        if missing or any(map(is_weights, changed)):
            fix = "Convert again, which writes them again: see --force."
        raise OutputError(f"{folder}: {', and '.join(found)}. {fix}")
    data = _small(folder / MANIFEST_NAME)
    if Manifest.parse(data, folder / MANIFEST_NAME) != manifest:
        raise OutputError(f"{folder / MANIFEST_NAME} was changed while it was read. Run the same command again.")
    return small | {MANIFEST_NAME: data}, large


def _small(path: Path) -> bytes:
    if os.path.islink(path):  # a link in a folder from elsewhere may lead to this user's secrets
        raise OutputError(f"{path} is a link. To publish the file that it leads to, replace the link with a copy.")
    try:
        return read_small(path)
    except SourceError as error:
        raise OutputError(f"{error} It is one of the files to push.") from error


def card_files(
    folder: Path, repository: Repository, manifest: Manifest, push: PushOptions, *, was_verified_here: bool = True
) -> dict[str, bytes]:
    """Return the model card by file name: the folder's own, or a generated one.

    The result is empty if the folder has none and the repository has one that someone else wrote. A generated card
    keeps the licence and the tags that were added to an earlier one.

    Raises:
        UsageError: the Hub does not accept the card.
        OutputError: the folder's card cannot be read.
        HubError: the repository's card cannot be read.
    """
    if os.path.lexists(folder / CARD_NAME):
        own = _small(folder / CARD_NAME)
        check_card(own.decode("utf-8", "replace"), str(folder / CARD_NAME))
        return {CARD_NAME: own}
    there = repository.read_card()
    if there is not None and not is_ours(there):
        return {}
    kept, tags = kept_metadata(there) if there is not None else ({}, [])
    licence = {"license": push.license} if push.license is not None else kept
    card = make_card(manifest, repository.id, licence, [*tags, *push.tags], was_verified_here=was_verified_here)
    return {CARD_NAME: card.encode()}
