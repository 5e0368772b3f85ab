"""Publishing: a repository on the Hub, its files sent one by one and made visible by one commit.

A large file can be deleted once it is sent, and what the Hub has is not sent again, so that a model
needs no more disk than its largest file and an interrupted upload goes on. huggingface_hub is
imported where it is used: it costs memory, which a conversion has no use for.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from streamconv.errors import HubError, MissingUploadError, OutputError, UsageError
from streamconv.formats.safetensors import LOADED_BESIDE
from streamconv.hub.card import CARD_NAME
from streamconv.hub.client import PATIENCE, Hub
from streamconv.progress import Progress, ignore_progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

# Weights as streamconv names them, which another conversion of the same model may replace.
OUR_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# What the Hub says of a commit whose uploaded file it does not have, or has no more.
MISSING_UPLOAD = "pointer pointed to a file that does not exist"


@dataclass(frozen=True)
class Destination:
    """Where to, as the user asked for. ``repo`` is "user/name", a name of the user's, or None for the model's own."""

    repo: str | None = None
    private: bool = False
    revision: str | None = None
    create_pr: bool = False


class Repository:
    """A repository of the Hub that this user may write. ``id`` is its "user/name".

    Args:
        wanted: What the user asked for.
        default_name: The name that the model was published under, where it was.

    Raises:
        UsageError: there is no name, or it is none that the Hub takes.
        HubError: there is no token, the Hub cannot be reached or refuses the token, the token may
            only read, or the repository is public and should be private, or holds other weights.
            Nothing was changed there.
    """

    def __init__(self, wanted: Destination, default_name: str | None):
        self._wanted, name = wanted, wanted.repo if wanted.repo is not None else default_name
        if not name:
            raise UsageError("The model is no published one, so its repository needs a name. Give --push-to-hub NAME.")
        _require_name(name)
        self._hub = Hub()
        self._api = self._hub.api
        who = self._hub.ask("The token cannot be used", self._api.whoami, is_repeated=False)
        self.id = name if "/" in name else f"{who['name']}/{name}"
        _require_name(self.id)
        if _is_read_only(who, wanted.create_pr):
            raise HubError(
                f"The token may only read, and {self.id} is to be written. Make one that may write at "
                f"{self._hub.settings} and log in with it: hf auth login, or HF_TOKEN."
            )
        self._uploaded: dict[str, CommitOperationAdd] = {}
        self._restored: list[str] = []
        self.refuse_others(None)

    @property
    def address(self) -> str:
        return f"{self._hub.endpoint}/{self.id}"

    def refuse_others(self, names: Collection[str] | None) -> None:
        """Refuse a revision that holds weights which transformers would load instead of ours, or beside.

        Args:
            names: Of the files that will be written; None while they are not known, when whatever
                streamconv may write is let pass.

        Raises:
            HubError: it does, or is public where a private one was asked for.
        """
        info = self._hub.ask(f"{self.id} cannot be looked at", self._look)
        if info is None:
            return
        if self._wanted.private and info.private is False:
            raise HubError(
                f"{self.id} exists and is public. Make it private at {self.address}/settings, leave --private out, "
                "or choose another name."
            )
        self._refuse_others_in(info, names)

    def create(self) -> None:
        """Make the repository and the revision's branch where they are not.

        Raises:
            HubError: the user may not.
        """
        private = self._wanted.private or None  # None: as the account does by itself
        failed = f"{self.id} cannot be created"
        self._hub.ask(failed, self._api.create_repo, self.id, private=private, exist_ok=True)
        branch = self._wanted.revision
        if branch is not None and not branch.startswith("refs/"):
            failed = f"The branch {branch} of {self.id} cannot be created"
            self._hub.ask(failed, self._api.create_branch, self.id, branch=branch, exist_ok=True)

    def upload(self, path: Path, name: str, sha256: str, progress: Progress = ignore_progress) -> None:
        """Send one large file, which may be deleted then; a commit will make it visible as ``name``.

        Args:
            sha256: The file's, in hexadecimal, as it was when it was written.

        Raises:
            OutputError: the file has another sha256.
            HubError: the Hub does not take it.
        """
        from huggingface_hub import CommitOperationAdd

        progress(f"sending {name} to {self.id}", 0, 1, "steps")
        operation = CommitOperationAdd(name, str(path))
        require_digest(path, operation.upload_info.sha256.hex(), sha256)
        self._hub.ask(
            f"{name} cannot be sent to {self.id}",
            self._api.preupload_lfs_files,
            self.id,
            additions=[operation],
            revision=self._wanted.revision,
            create_pr=self._wanted.create_pr,
        )
        if not operation._is_uploaded:  # the Hub wants it in the commit itself, or not at all
            raise HubError(f"{self.id} does not keep {name} as a large file. Remove its .gitattributes and .gitignore.")
        self._uploaded[name] = operation

    def restore(self, name: str, size: int, sha256: str) -> None:
        """Say that an earlier process sent this file: the commit names it without sending it again."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.lfs import UploadInfo

        operation = CommitOperationAdd(name, b"")
        # What huggingface_hub itself sets when it has sent a file; it has no public way to say so of another process.
        operation.upload_info = UploadInfo(size=size, sample=b"", sha256=bytes.fromhex(sha256))
        operation._upload_mode, operation._is_uploaded = "lfs", True
        self._uploaded[name] = operation
        self._restored.append(name)

    def read_card(self) -> str | None:
        """The model card that the revision has; None where it has none.

        Raises:
            HubError: the Hub does not say.
        """
        info = self._hub.ask(f"{self.id} cannot be looked at", self._look)
        if info is None or all(file.rfilename != CARD_NAME for file in info.siblings or ()):
            return None
        return self._hub.ask(f"The card of {self.id} cannot be read", self._read_card, info.sha)

    def _read_card(self, revision: str) -> str:
        with TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(self.id, CARD_NAME, revision=revision, local_dir=folder)
            return Path(path).read_text("utf-8", "replace")

    def commit(self, files: Mapping[str, bytes | Path], message: str) -> str:
        """Make the uploaded files and these small ones visible, all at once; the commit's or pull request's address.

        Where the revision holds just these files already, there is no new commit.

        Raises:
            MissingUploadError: the Hub has lost what `restore` said it has.
            HubError: it takes no commit, or holds other weights by now.
        """
        from huggingface_hub import CommitOperationAdd

        small = [CommitOperationAdd(n, data if isinstance(data, bytes) else str(data)) for n, data in files.items()]
        operations = [*small, *self._uploaded.values()]
        names = {operation.path_in_repo for operation in operations}
        wanted = self._wanted

        def attempt() -> str:
            # Looked at anew each time: a commit whose answer was lost is seen to be there, and is not made twice.
            info = self._api.model_info(self.id, revision=wanted.revision, files_metadata=True, timeout=PATIENCE)
            self._refuse_others_in(info, names)
            if not wanted.create_pr and all(_holds(info, operation) for operation in operations):
                return f"{self.address}/commit/{info.sha}"
            done = self._api.create_commit(
                self.id,
                operations,
                commit_message=message,
                revision=wanted.revision,
                create_pr=wanted.create_pr,
                parent_commit=info.sha,
            )
            return str(done.pr_url or done.commit_url)

        try:
            # A pull request whose answer was lost would be opened twice.
            return self._hub.ask(f"{self.id} takes no commit", attempt, is_repeated=not wanted.create_pr)
        except HubError as error:
            if self._restored and MISSING_UPLOAD in error.said.lower():
                lost = f"{self.id} has lost what was sent before, {', '.join(self._restored)}"
                raise MissingUploadError(f"{lost}. Run the same command again.", error.said, self._restored) from None
            raise

    def _look(self) -> Any:
        """The revision's information, or, where it is to be made, that of what it will begin from; None for nothing."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        for revision in dict.fromkeys((self._wanted.revision, None)):
            try:
                return self._api.model_info(self.id, revision=revision, timeout=PATIENCE)
            except GatedRepoError:
                raise
            except RevisionNotFoundError:
                continue
            except RepositoryNotFoundError:
                break
        return None

    def _refuse_others_in(self, info: Any, names: Collection[str] | None) -> None:
        others = sorted(
            name
            for name in (file.rfilename for file in info.siblings or ())
            if any(fnmatch(name, pattern) for pattern in LOADED_BESIDE)
            and "/" not in name
            and (name not in names if names is not None else not OUR_WEIGHTS.fullmatch(name))
        )
        if others:
            where = f"{self.id} at {self._wanted.revision}" if self._wanted.revision else self.id
            raise HubError(
                f"{where} already holds {', '.join(others)}, which transformers would load instead of what is to be "
                "pushed, or beside it. Delete them there, or choose another repository or --revision."
            )


def require_digest(path: Path, digest: str, wanted: str) -> None:
    if digest != wanted:
        raise OutputError(
            f"{path} has changed since it was written: its sha256 is {digest}, not {wanted}. Convert again."
        )


def _require_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{name} is no repository's name: {error} Give --push-to-hub NAME or USER/NAME.") from None


def _is_read_only(who: Mapping[str, Any], create_pr: bool) -> bool:
    """Whether the Hub says that the token can write nowhere. Where it may not write here, the Hub will say so."""
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") != "fineGrained":
        return bool(token.get("role") == "read")
    scopes = (token.get("fineGrained") or {}).get("scoped") or ()
    rights = {right for scope in scopes for right in scope.get("permissions") or ()}
    return "repo.write" not in rights and not (create_pr and "discussion.write" in rights)


def _holds(info: Any, operation: "CommitOperationAdd") -> bool:
    """Whether a revision has the file as it is."""
    file = next((file for file in info.siblings or () if file.rfilename == operation.path_in_repo), None)
    if file is None:
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == operation.upload_info.sha256.hex())
    with operation.as_file() as content:
        data = content.read()
    # The name that git itself gives a file's content; a hash of git's, where no one guards against attacks.
    return bool(file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())
