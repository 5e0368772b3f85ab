"""The repository that a model is pushed to: as the user asks for it, and as the Hub has it."""

from dataclasses import dataclass
from typing import Any

from streamconv.arguments import check_fields


@dataclass(frozen=True)
class Destination:
    """The repository and revision that the user asked for.

    ``repo`` is "user/name", or just a name in the user's own namespace. None stands for the name that the model was
    published under if the weights are the published ones, and for the name of the output's folder otherwise.
    ``private``: a new repository is created as a private one, and an existing public one is refused. ``revision`` is
    the branch, created if needed; None for the main branch. ``create_pr`` opens a pull request instead of committing.
    """

    repo: str | None = None
    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        check_fields(self, Destination)


@dataclass(frozen=True)
class PushTarget:
    """The repository that will be pushed to, "user/name", as it was checked before anything is changed on the Hub.

    ``exists``: it exists already. ``private`` is None if a new one gets its owner's default visibility, which is public
    unless the owner has changed it.
    """

    repository: str
    url: str
    exists: bool
    private: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Return the target for JSON."""
        return {"repository": self.repository, "url": self.url, "exists": self.exists, "private": self.private}
