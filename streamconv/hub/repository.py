"""A repository on the Hub: large files are uploaded one by one, then a single commit makes them visible.

A large file may be deleted once it is uploaded, and files that the Hub already has are not uploaded again.
So a model needs no more disk space than its largest file, and an interrupted upload can be resumed.
huggingface_hub is imported only where it is used, because it costs memory that a conversion does not need.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.errors import HubError, MissingUploadError, UsageError
from streamconv.formats.safetensors import CONFLICTING_PATTERNS
from streamconv.hub.card import CARD_NAME
from streamconv.hub.checks import check_name, holds, is_read_only, require_digest
from streamconv.hub.client import MISSING_UPLOAD, HubClient
from streamconv.hub.transport import TIMEOUT_SECONDS
from streamconv.progress import Progress, ignore_progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

# The names that streamconv gives to weights. A later conversion may replace files with these names.
OUR_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True)
class Destination:
    """The repository and revision that the user asked for.

    ``repo`` is "user/name", just a name in the user's own namespace, or None for the model's published name.
    ``private``: a new repository is created as a private one, and an existing public one is refused. ``revision`` is
    the branch, created if needed; None for the main branch. ``create_pr`` opens a pull request instead of committing.
    """

    repo: str | None = None
    private: bool = False
    revision: str | None = None
    create_pr: bool = False


class Repository:
    """A repository on the Hub that this user can write to. ``id`` is its "user/name".

    Args:
        destination: The repository and revision that the user asked for.
        default_name: The name that the model was published under, if it was published.

    Raises:
        UsageError: there is no name, or the Hub does not accept it.
        HubError: there is no token, the Hub cannot be reached or does not accept the token, the token is
            read-only, the repository is public although a private one was asked for, or it holds other
            weights. Nothing has been changed on the Hub.
    """

    def __init__(self, destination: Destination, default_name: str | None):
        self._destination = destination
        name = destination.repo if destination.repo is not None else default_name
        if not name:
            raise UsageError("This is not a published model, so its repository needs a name. Use --push-to-hub NAME.")
        check_name(name)
        self._hub = HubClient()
        self._api = self._hub.api
        user = self._hub.call("The token cannot be used", self._api.whoami, is_repeatable=False)
        self.id = name if "/" in name else f"{user['name']}/{name}"
        check_name(self.id)
        if is_read_only(user, destination.create_pr):
            raise HubError(
                f"The token is read-only, so {self.id} cannot be written. Create a token with write access at "
                f"{self._hub.token_settings}, then log in with `hf auth login` or set HF_TOKEN."
            )
        self._uploaded: dict[str, CommitOperationAdd] = {}
        self._restored: list[str] = []
        self.refuse_others(None)

    @property
    def url(self) -> str:
        return f"{self._hub.endpoint}/{self.id}"

    def refuse_others(self, names: Collection[str] | None) -> None:
        """Refuse a revision with other weights, which transformers would load instead of ours or in addition.

        Args:
            names: The files that will be written. None if they are not known yet; then every name that
                streamconv writes is accepted.

        Raises:
            HubError: there are such weights, or the repository is public although a private one was asked for.
        """
        info = self._hub.call(f"{self.id} cannot be read", self._find_revision)
        if info is None:
            return
        if self._destination.private and info.private is False:
            raise HubError(
                f"{self.id} exists and is public. Make it private at {self.url}/settings, omit --private, "
                "or choose another name."
            )
        self._refuse_other_weights(info, names)

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
        from huggingface_hub import CommitOperationAdd

        progress(f"uploading {name} to {self.id}", 0, 1, "steps")
        operation = CommitOperationAdd(name, str(path))
        require_digest(path, operation.upload_info.sha256.hex(), sha256)
        self._hub.call(
            f"{name} cannot be uploaded to {self.id}",
            self._api.preupload_lfs_files,
            self.id,
            additions=[operation],
            revision=self._destination.revision,
            create_pr=self._destination.create_pr,
        )
        if not operation._is_uploaded:  # the Hub wants the file in the commit itself, or ignores it
            raise HubError(
                f"{self.id} does not store {name} as a large file. Remove .gitattributes and .gitignore there."
            )
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

    def read_card(self) -> str | None:
        """Read the revision's model card; None if it has none.

        Raises:
            HubError: it cannot be read.
        """
        info = self._hub.call(f"{self.id} cannot be read", self._find_revision)
        if info is None or all(file.rfilename != CARD_NAME for file in info.siblings or ()):
            return None
        return self._hub.call(f"The card of {self.id} cannot be read", self._read_card, info.sha)

    def _read_card(self, revision: str) -> str:
        from tempfile import TemporaryDirectory  # takes memory, which a conversion should not pay

        with TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(self.id, CARD_NAME, revision=revision, local_dir=folder)
            return Path(path).read_text("utf-8", "replace")

    def commit(self, files: Mapping[str, bytes | Path], message: str) -> str:
        """Commit the uploaded files and these small ones, all at once.

        If the revision already holds these very files, no commit is made.

        Returns:
            The URL of the commit or pull request.

        Raises:
            MissingUploadError: the Hub does not have a file that was declared by `restore`.
            HubError: the commit failed, or the revision holds other weights by now.
        """
        from huggingface_hub import CommitOperationAdd

        small = [CommitOperationAdd(n, data if isinstance(data, bytes) else str(data)) for n, data in files.items()]
        operations = [*small, *self._uploaded.values()]
        names = {operation.path_in_repo for operation in operations}
        destination = self._destination

        def commit_once() -> str:
            # The revision is read again for each retry: if the commit was made and only the response was lost, we see
            # it there and do not commit twice.
            info = self._api.model_info(
                self.id, revision=destination.revision, files_metadata=True, timeout=TIMEOUT_SECONDS
            )
            self._refuse_other_weights(info, names)
            if not destination.create_pr and all(holds(info, operation) for operation in operations):
                return f"{self.url}/commit/{info.sha}"
            commit = self._api.create_commit(
                self.id,
                operations,
                commit_message=message,
                revision=destination.revision,
                create_pr=destination.create_pr,
                parent_commit=info.sha,
            )
            return str(commit.pr_url or commit.commit_url)

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

    def _find_revision(self) -> Any:
        """Return the `ModelInfo` of the revision, or of the main branch from which it would be created, or None."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        for revision in dict.fromkeys((self._destination.revision, None)):
            try:
                return self._api.model_info(self.id, revision=revision, timeout=TIMEOUT_SECONDS)
            except GatedRepoError:
                raise
            except RevisionNotFoundError:
                continue
            except RepositoryNotFoundError:
                break
        return None

    def _refuse_other_weights(self, info: Any, names: Collection[str] | None) -> None:
        others = sorted(
            name
            for name in (file.rfilename for file in info.siblings or ())
            if any(fnmatch(name, pattern) for pattern in CONFLICTING_PATTERNS)
            and "/" not in name
            and (name not in names if names is not None else not OUR_WEIGHTS.fullmatch(name))
        )
        if others:
            where = f"{self.id} at {self._destination.revision}" if self._destination.revision else self.id
            raise HubError(
                f"{where} already holds {', '.join(others)}, which transformers would load instead of the new weights "
                "or in addition to them. Delete them there, or choose another repository or --revision."
            )
