"""Opens the repository to push to, and refuses whatever the Hub or the user's own files would refuse later."""

import os
from collections.abc import Callable
from pathlib import Path

from streamconv.errors import UsageError
from streamconv.families.base import Model
from streamconv.hub.card import CARD_NAME, front_matter, is_ours, licence_entries
from streamconv.hub.card_check import check_card
from streamconv.hub.destination import PushTarget
from streamconv.hub.names import default_name, published_model
from streamconv.hub.repository import Repository
from streamconv.jobs.options import PushOptions
from streamconv.output.manifest import Provenance

OnPush = Callable[[PushTarget], None]
"""Called once with the repository that will be pushed to, before anything is converted or uploaded."""


def ignore_target(target: PushTarget) -> None:
    """Do nothing: the default `OnPush`."""


def open_repository(push: PushOptions, folder: Path, provenance: Provenance | None) -> Repository:
    """Open the repository to push to.

    Args:
        folder: The output, which may not exist yet.
        provenance: What the output is made from; None if it is random weights.

    Raises:
        UsageError: the repository has no name, or the licence and tags cannot be used.
        HubError: see `Repository`. Nothing was changed on the Hub.
    """
    has_card = os.path.exists(folder / CARD_NAME)
    published = published_model(provenance) if provenance is not None else None
    model = published[1] if published is not None else None
    _check_licence(push, folder / CARD_NAME if has_card else None, model)
    named = push.destination.repo is not None
    repository = Repository(push.destination, None if named else default_name(folder, provenance))
    if push.license is not None or push.tags:
        there = repository.read_card()
        if there is not None and not is_ours(there):
            raise UsageError(
                f"{repository.id} has a model card that streamconv did not write and does not change. Set its licence "
                f"and tags at {repository.url}/edit/main/{CARD_NAME}, and omit --license and --tag."
            )
        entries = licence_entries({} if push.license is None else {"license": push.license}, model)
        check_card(front_matter(push.tags, **entries), "this licence and these tags", push.license)
    return repository


def _check_licence(push: PushOptions, card: Path | None, published: Model | None) -> None:
    if card is not None and (push.license is not None or push.tags):
        raise UsageError(
            f"{card} is your own model card, which --license and --tag do not change. Write the licence and the tags "
            "into it, and omit the options, or delete it."
        )
    if published is not None and push.license not in (None, published.licence):
        raise UsageError(
            f"{published.name} was published under the licence {published.licence}, not {push.license}. Omit --license."
        )
