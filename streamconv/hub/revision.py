"""Reads what a repository holds at the revision that a model is pushed to."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from streamconv.errors import HubError
from streamconv.hub.card import CARD_NAME
from streamconv.hub.checks import other_weights
from streamconv.hub.client import HubClient
from streamconv.hub.destination import Destination
from streamconv.hub.transport import TIMEOUT_SECONDS


class Revision:
    """The revision of the repository ``id`` that the user asked for; nothing here changes it."""

    def __init__(self, hub: HubClient, id: str, destination: Destination):
        self._hub, self._id, self._destination = hub, id, destination

    def read(self, *, files_metadata: bool = False) -> Any:
        """Return the `ModelInfo` of the revision, or of the main branch from which it would be created, or None.

        Args:
            files_metadata: With the size and the hash of each file.

        Raises:
            HubError: it cannot be read.
        """
        return self._hub.call(f"{self._id} cannot be read", self._find, files_metadata)

    def _find(self, files_metadata: bool) -> Any:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        for revision in dict.fromkeys((self._destination.revision, None)):
            try:
                return self._hub.api.model_info(
                    self._id, revision=revision, files_metadata=files_metadata, timeout=TIMEOUT_SECONDS
                )
            except GatedRepoError:
                raise
            except RevisionNotFoundError:
                continue
            except RepositoryNotFoundError:
                break
        return None

    def read_card(self) -> str | None:
        """Read the model card; None if there is none.

        Raises:
            HubError: it cannot be read.
        """
        info = self.read()
        if info is None or all(file.rfilename != CARD_NAME for file in info.siblings or ()):
            return None
        return self._hub.call(f"The card of {self._id} cannot be read", self._download_card, info.sha)

    def _download_card(self, revision: str) -> str:
        from tempfile import TemporaryDirectory  # takes memory, which a conversion should not pay

        with TemporaryDirectory() as folder:
            path = self._hub.api.hf_hub_download(self._id, CARD_NAME, revision=revision, local_dir=folder)
            return Path(path).read_text("utf-8", "replace")

    def refuse_others(self, info: Any, names: Collection[str] | None) -> None:
        """Refuse a public repository if a private one was asked for, and a revision with other weights.

        Args:
            info: The result of `read`.
            names: See `other_weights`.

        Raises:
            HubError
        """
        if info is None:
            return
        if self._destination.private and info.private is False:
            raise HubError(
                f"{self._id} exists and is public. Make it private at {self._hub.endpoint}/{self._id}/settings, omit "
                "--private, or choose another name."
            )
        self.refuse_other_weights(info, names)

    def refuse_other_weights(self, info: Any, names: Collection[str] | None) -> None:
        """Refuse a revision with weights that transformers would load instead of ours or in addition.

        Raises:
            HubError
        """
        others = other_weights([file.rfilename for file in info.siblings or ()], names)
        if others:
            where = f"{self._id} at {self._destination.revision}" if self._destination.revision else self._id
            raise HubError(
                f"{where} already holds {', '.join(others)}, which transformers would load instead of the new weights "
                "or in addition to them. Delete them there, or choose another repository or --revision."
            )
