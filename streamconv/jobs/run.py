"""What `run --push-to-hub` asks for: its options, what is refused before anything is converted, and the push."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.cli.progress_bar import ProgressReport
from streamconv.errors import UsageError
from streamconv.families.registry import find_model
from streamconv.hub.repository import Destination, Repository
from streamconv.jobs.convert import plan
from streamconv.jobs.publish import publish


@dataclass(frozen=True)
class Pushing:
    """A push to come, as `run` is told."""

    destination: Destination
    unverified: bool

    def open(self, source: str, synthetic: bool, **options: Any) -> Repository:
        """The repository, with all refused that can be before a conversion. ``options`` are `streamconv.plan`'s.

        Raises:
            UsageError, SourceError: the source's, where the repository is to have its model's name.
            HubError: as `Repository`'s.
        """
        name = None
        if self.destination.repo is None:
            model = find_model(source)[1] if synthetic else plan(source, **options).model
            name = model.published_name if model is not None else None
        return Repository(self.destination, name)

    def push(self, folder: Path, repository: Repository) -> str:
        with ProgressReport() as progress:
            return publish(folder, repository, progress)


def read_options(
    push_to_hub: str | None, private: bool, revision: str | None, create_pr: bool, unverified: bool, is_verified: bool
) -> Pushing | None:
    """What the options of `run` ask for; None for no push.

    Raises:
        UsageError: they do not go together, or --push-to-hub took the source for its value.
    """
    if push_to_hub is None:
        given = {"--private": private, "--revision": revision is not None, "--create-pr": create_pr}
        alone = [name for name, is_given in {**given, "--push-unverified": unverified}.items() if is_given]
        if alone:
            raise UsageError(
                f"{' and '.join(alone)} {'is' if len(alone) == 1 else 'are'} for --push-to-hub. Give it too."
            )
        return None
    if _is_source(push_to_hub):
        raise UsageError(
            f"--push-to-hub took {push_to_hub} for the repository's name, and it is a source. Put the source first, "
            f"streamconv run {push_to_hub} --push-to-hub, or name a repository as USER/NAME."
        )
    if revision == "":
        raise UsageError("--revision is empty. Give the name of a branch.")
    if not is_verified and not unverified:
        raise UsageError("Nothing is pushed unverified. Leave --no-verify out, or insist: --push-unverified.")
    return Pushing(Destination(push_to_hub or None, private, revision, create_pr), unverified)


def _is_source(word: str) -> bool:
    if "://" in word or os.path.isfile(word):
        return True
    try:
        find_model(word)
    except UsageError:
        return False
    return True
