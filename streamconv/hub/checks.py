"""Checks before the Hub is changed: names, rights, and files that are as they were written."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.errors import OutputError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


def require_digest(path: Path, digest: str, expected: str) -> None:
    """Raise an OutputError if a file's sha256 is not the one that it had when it was written."""
    if digest != expected:
        raise OutputError(
            f"{path} has changed since it was written: its sha256 is {digest}, not {expected}. Convert again."
        )


def check_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(
            f"{name} is not a valid repository name: {error} Use --push-to-hub NAME or USER/NAME."
        ) from None


def is_read_only(user: Mapping[str, Any], create_pr: bool) -> bool:
    """True if the token cannot write anywhere. If it can write, but not to this repository, a later call fails.

    ``user`` is the response of `whoami`.
    """
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") != "fineGrained":
        return bool(token.get("role") == "read")
    scopes = (token.get("fineGrained") or {}).get("scoped") or ()
    rights = {right for scope in scopes for right in scope.get("permissions") or ()}
    return "repo.write" not in rights and not (create_pr and "discussion.write" in rights)


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
