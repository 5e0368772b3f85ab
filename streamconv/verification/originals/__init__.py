"""The original models, reimplemented: one module per family, with the family's name and its ``ARCHITECTURE``."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv.families.base import Model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OriginalArchitecture:
    """The code of a family's original models, for verification; dimensions have the family's own type.

    Attributes:
        repository: The authors' repository, for torch.hub.
        build: Builds the model of certain dimensions on the current device, with the original's parameter names, so
            that ``load_state_dict(strict=True)`` accepts the original's file.
        load: Loads the published ``model`` from ``(repository, source)`` through torch.hub, with its authors' own code
            and without weights.
        states: Runs either of the two on ``(model, pixels, as_transformers)`` and yields the output of every layer.
        prefix_tokens: Names and numbers of the tokens before the patches, in their order, (B, number, D) each.
        interpolates_differently: Whether the original interpolates positions at other sizes in another way than
            transformers. Then ``states`` does it like transformers if it is called with ``as_transformers``.
    """

    repository: str
    build: Callable[[Any], Any]
    load: Callable[[str, str, Model], Any]
    states: "Callable[[Any, Tensor, bool], Iterator[tuple[str, Tensor]]]"
    prefix_tokens: Callable[[Any], Mapping[str, int]]
    interpolates_differently: Callable[[Any], bool]


def original_of(family_name: str) -> OriginalArchitecture:
    """Import a family's module, and torch with it."""
    module = importlib.import_module(f"{__name__}.{family_name}")
    architecture: OriginalArchitecture = module.ARCHITECTURE
    return architecture
