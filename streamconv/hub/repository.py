"""A repository on the Hub: large files are uploaded one by one, then a single commit makes them visible.

A large file may be deleted once it is uploaded, and files that the Hub already has are not uploaded again.
So a model needs no more disk space than its largest file, and an interrupted upload can be resumed.
huggingface_hub is imported only where it is used, because it costs memory that a conversion does not need.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv.errors import HubError, MissingUploadError, UsageError
from streamconv.hub.checks import LargeFile, check_name, hashed, holds, require_digest
from streamconv.hub.client import MISSING_UPLOAD, HubClient
from streamconv.hub.destination import Destination, PushTarget
from streamconv.hub.revision import Revision
from streamconv.hub.rights import User, missing_right
from streamconv.hub.transport import TIMEOUT_SECONDS
from streamconv.progress import Progress, ignore_progress
from streamconv.redaction import shown_url

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


@dataclass(frozen=True)
class Commit:
    """A commit or pull request by its URL. ``is_new`` is false if the revision already held the same files."""

    url: str
    private: bool
    is_new: bool


class Repository:
    """A repository on the Hub that this user can write to. ``id`` is its "user/name".

    Args:
        destination: The repository and revision that the user asked for.
        default_name: The name of the repository if the user gave none.

    Raises:
        UsageError: there is no name, or the Hub does not accept it.
        HubError: there is no token, the Hub cannot be reached or does not accept the token, the token may not write to
            the repository, which is public although a private one was asked for, or holds other weights. Nothing has
            been changed on the Hub.
    """

    def __init__(self, destination: Destination, default_name: str | None):
        self._destination = destination
        name = destination.repo if destination.repo is not None else default_name
        if not name:
            raise UsageError("The repository needs a name. Give it as USER/NAME or NAME.")
        check_name(name)
        self._hub = HubClient()
        self._api = self._hub.api
        user = self._hub.whoami()
        self.id = name if "/" in name else f"{user['name']}/{name}"
        check_name(self.id)
        self._uploaded: dict[str, CommitOperationAdd] = {}
        self._restored: list[str] = []
        self._revision = Revision(self._hub, self.id, destination)
        info = self._revision.read()
        self._require_rights(user, exists=info is not None)
        self._revision.refuse_others(info, None)
        self.target = PushTarget(
            self.id,
            f"{self._hub.endpoint}/{self.id}",
            exists=info is not None,
            private=bool(info.private) if info is not None else destination.private or None,
        )

    def _require_rights(self, user: User, *, exists: bool) -> None:
        create_pr = self._destination.create_pr
        reason = missing_right(user, self.id, exists=exists, create_pr=create_pr)
        if reason is None and exists and not create_pr and self._hub.forbids_writing(self.id):
            reason = "the token may not write to this repository"
        if reason is not None:
            raise HubError(
                f"{self.id} cannot be written: {reason}. Choose another repository, or create a token with write "
                f"access to this one at {self._hub.token_settings}, then log in with `hf auth login` or set HF_TOKEN."
            )

    @property
    def url(self) -> str:
        return self.target.url

    def refuse_others(self, names: Collection[str] | None) -> None:
        """Refuse a revision with other weights; see `Revision.refuse_others`."""
        self._revision.refuse_others(self._revision.read(), names)

    def read_card(self) -> str | None:
        """Read the revision's model card; None if it has none.

        Raises:
            HubError: it cannot be read.
        """
        return self._revision.read_card()

    def create(self) -> None:
        """Create the repository and the revision's branch if they do not exist.

        Raises:
            HubError: they cannot be created.
        """
        private = self._destination.private or None  # None: the account's default
        failure = f"{self.id} cannot be created"
        self._hub.call(failure, self._api.create_repo, self.id, private=private, exist_ok=True)
        branch = self._destination.revision
        if branch is not None and not branch.startswith("refs/"):
            failure = f"The branch {branch} of {self.id} cannot be created"
            self._hub.call(failure, self._api.create_branch, self.id, branch=branch, exist_ok=True)

    def upload(self, path: Path, name: str, sha256: str, progress: Progress = ignore_progress) -> None:
        """Upload one large file. It may be deleted afterwards; a commit will make it visible as ``name``.

        Args:
            sha256: The hexadecimal digest that the file had when it was written.

        Raises:
            OutputError: the file has a different sha256 now.
            HubError: the upload failed.
        """
        file = hashed(path, name, progress)
        require_digest(path, file.sha256, sha256)
        self.send(file, progress)

    def send(self, file: LargeFile, progress: Progress = ignore_progress) -> None:
        """Upload one large file; see `upload`.

        Raises:
            OutputError: the file was changed after its sha256 was computed.
        """
        operation, name = file.operation, file.operation.path_in_repo
        progress(f"uploading {name} to {self.id}", 0, 1, "steps")
        try:
            self._hub.call(
                f"{name} cannot be uploaded to {self.id}",
                self._api.preupload_lfs_files,
                self.id,
                additions=[operation],
                revision=self._destination.revision,
                create_pr=self._destination.create_pr,
                is_upload=True,
            )
        except HubError:
            file.require_unchanged()  # the Hub refuses bytes that do not have the sha256
            raise
        if not operation._is_uploaded:  # the Hub wants the file in the commit itself, or ignores it
            raise HubError(
                f"{self.id} does not store {name} as a large file. Remove .gitattributes and .gitignore there."
            )
        file.require_unchanged()
        self._uploaded[name] = operation

    def restore(self, name: str, size: int, sha256: str) -> None:
        """Declare that an earlier process uploaded this file, so that the commit includes it without a new upload."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.lfs import UploadInfo

        operation = CommitOperationAdd(name, b"")
        # huggingface_hub sets these after an upload; there is no public way to declare an upload by another process.
        operation.upload_info = UploadInfo(size=size, sample=b"", sha256=bytes.fromhex(sha256))
        operation._upload_mode, operation._is_uploaded = "lfs", True
        self._uploaded[name] = operation
        self._restored.append(name)

    def present(self, small: Mapping[str, bytes], large: Iterable["CommitOperationAdd"]) -> list[str]:
        """Return the names of those files that the revision already has, with the same contents.

        Raises:
            HubError: it cannot be read.
        """
        if not self.target.exists:
            return []
        info = self._revision.read(files_metadata=True)
        operations = [*large, *_operations(small)]
        return [each.path_in_repo for each in operations if info is not None and holds(info, each)]

    def commit(self, files: Mapping[str, bytes | Path], message: str) -> Commit:
        """Commit the uploaded files and these small ones, all at once.

        If the revision already holds these very files, no commit is made.

        Raises:
            MissingUploadError: the Hub does not have a file that was declared by `restore`.
            HubError: the commit failed, or the revision holds other weights by now.
        """
        operations = [*_operations(files), *self._uploaded.values()]
        names = {operation.path_in_repo for operation in operations}
        destination = self._destination

        def commit_once() -> Commit:
            # The revision is read again for each retry: if the commit was made and only the response was lost, we see
            # it there and do not commit twice.
            info = self._api.model_info(
                self.id, revision=destination.revision, files_metadata=True, timeout=TIMEOUT_SECONDS
            )
            self._revision.refuse_other_weights(info, names)
            if not destination.create_pr and all(holds(info, operation) for operation in operations):
                return Commit(f"{self.url}/commit/{info.sha}", bool(info.private), is_new=False)
            commit = self._api.create_commit(
                self.id,
                operations,
                commit_message=message,
                revision=destination.revision,
                create_pr=destination.create_pr,
                parent_commit=info.sha,
            )
            return Commit(shown_url(str(commit.pr_url or commit.commit_url)), bool(info.private), is_new=True)

        try:
            # A retry would open a second pull request if the first one was opened and only the response was lost.
            return self._hub.call(
                f"The commit to {self.id} failed", commit_once, is_repeatable=not destination.create_pr
            )
        except HubError as error:
            if self._restored and MISSING_UPLOAD.search(error.server_message):
                missing = ", ".join(self._restored)
                raise MissingUploadError(
                    f"{self.id} no longer has files that were uploaded earlier: {missing}. Run the same command again.",
                    error.server_message,
                    self._restored,
                ) from None
            raise


def _operations(files: Mapping[str, bytes | Path]) -> list["CommitOperationAdd"]:
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(n, data if isinstance(data, bytes) else str(data)) for n, data in files.items()]
