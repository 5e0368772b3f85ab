"""Checks before the Hub is changed: names, other weights there, and files that are still as they were written."""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.errors import OutputError, UnreadableError, UsageError
from streamconv.files.local import LocalFile
from streamconv.formats.safetensors import CONFLICTING_PATTERNS
from streamconv.output.manifest import OUR_WEIGHTS
from streamconv.output.readable import reading_output
from streamconv.output.snapshot import State, state_of
from streamconv.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


def require_digest(path: Path, digest: str, expected: str) -> None:
    """Raise an OutputError if a file's sha256 is not the one that it had when it was written."""
    if digest != expected:
        raise OutputError(
            f"{path} has changed since it was written: its sha256 is {digest}, not {expected}. Convert again."
        )


@dataclass(frozen=True)
class LargeFile:
    """A large file to upload, with its sha256. ``state`` was taken before the file was read."""

    path: Path
    operation: "CommitOperationAdd"
    state: State

    @property
    def sha256(self) -> str:
        return self.operation.upload_info.sha256.hex()

    def require_unchanged(self) -> None:
        """Raise an OutputError if the file was changed after its sha256 was computed."""
        if state_of(self.path) != self.state:
            raise OutputError(f"{self.path} was changed while it was uploaded. Verify the folder again.")


def hashed(path: Path, name: str, progress: Progress) -> LargeFile:
    """Compute a large file's sha256, by which the Hub knows it; the result is uploaded later.

    Raises:
        OutputError: it cannot be read.
    """
    from huggingface_hub import CommitOperationAdd

    progress(f"checking {name}", 0, 1, "steps")
    state = state_of(path)
    with reading_output():
        LocalFile(path).close()  # huggingface_hub's own error does not say why a file cannot be opened
        try:
            return LargeFile(path, CommitOperationAdd(name, str(path)), state)
        except OSError as error:
            raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error


def check_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{name} is not a valid repository name: {error} Write it as USER/NAME or NAME.") from None


def other_weights(present: Iterable[str], names: Collection[str] | None) -> list[str]:
    """Return those of the files in a revision that transformers would load instead of ours or in addition.

    Args:
        names: The files that will be written. None if they are not known yet; then every name that streamconv writes
            is accepted.
    """
    return sorted(
        name
        for name in present
        if any(fnmatch(name, pattern) for pattern in CONFLICTING_PATTERNS)
        and "/" not in name
        and (name not in names if names is not None else not OUR_WEIGHTS.fullmatch(name))
    )


def holds(info: Any, operation: "CommitOperationAdd") -> bool:
    """True if the revision has exactly this file already."""
    file = next((file for file in info.siblings or () if file.rfilename == operation.path_in_repo), None)
    if file is None:
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == operation.upload_info.sha256.hex())
    with operation.as_file() as content:
        data = content.read()
    # git's own name for this content (a blob id). It only detects equality, it does not protect against attacks.
    return bool(file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())
