"""The rights of a token, as far as the Hub's answer to `whoami` shows them.

A refusal here is certain. Whatever the answer leaves open is decided by a later call to the Hub.
"""

from collections.abc import Iterator, Mapping
from typing import Any

User = Mapping[str, Any]
"""The Hub's answer to `whoami`."""


def missing_right(user: User, repo_id: str, *, exists: bool, create_pr: bool) -> str | None:
    """Return why a token cannot push to a repository, as the rest of a sentence; None if it may be able to.

    Args:
        exists: The repository exists; a new one is created in its owner's namespace.
        create_pr: Only a pull request is opened.
    """
    auth = user.get("auth") or {}
    token = auth.get("accessToken") or {}
    role, owner = token.get("role"), repo_id.partition("/")[0]
    if role == "read":
        return "the token is read-only"
    if role == "fineGrained":
        return _missing_scope(token.get("fineGrained") or {}, repo_id, exists=exists, create_pr=create_pr)
    if role != "write" or (exists and create_pr) or "orgs" not in user or _is(owner, user.get("name")):
        return None
    organisation = next((each for each in user["orgs"] if _is(owner, each.get("name"))), None)
    if organisation is None:
        return f"{owner} is neither your account, {user.get('name')}, nor an organisation that you are a member of"
    return f"your role in {owner} is read-only" if organisation.get("roleInOrg") == "read" else None


def _missing_scope(rights: Mapping[str, Any], repo_id: str, *, exists: bool, create_pr: bool) -> str | None:
    if "scoped" not in rights:
        return None
    scopes = [each for each in rights["scoped"] or () if "permissions" in each]
    writable = [name for each in scopes if "repo.write" in each["permissions"] for name in _names(each)]
    if exists and create_pr:
        may_discuss = [*(rights.get("global") or ()), *(right for each in scopes for right in each["permissions"])]
        if "discussion.write" in may_discuss:
            return None
    if not writable:
        return "the token is read-only"
    owner = repo_id.partition("/")[0]
    if any(_is(owner, name) or (exists and _is(repo_id, name)) for name in writable):
        return None
    return f"the token can write only to {' and '.join(writable)}"


def _names(scope: Mapping[str, Any]) -> Iterator[str]:
    """Yield the user, organisation or repository that a scope is for."""
    name = (scope.get("entity") or {}).get("name")
    if isinstance(name, str):
        yield name


def _is(one: str, other: object) -> bool:
    """Return whether two names are the same on the Hub, where case does not distinguish names."""
    return isinstance(other, str) and one.lower() == other.lower()
