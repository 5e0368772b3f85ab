"""The original models, reimplemented: one module per family, with the family's name and its ``ARCHITECTURE``."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv.families.base import Model

if TYPE_CHECKING:
    from torch import Tensor


def first_module_list(model: Any) -> Sequence[Any]:
    """Return the modules of the first ``nn.ModuleList`` in a model."""
    from torch import nn

    return [*next(module for module in model.modules() if isinstance(module, nn.ModuleList))]


@dataclass(frozen=True)
class KnownDifference:
    """A computation that differs by design between the authors' code and transformers, for any weights.

    The check of outputs runs the original like transformers there. The difference is measured, but decides nothing.

    Attributes:
        changes: The beginning of a sentence that ends in "by up to" and numbers.
        for_check: The rest of a sentence about the check: what the original did instead.
        explanation: A paragraph about both.
    """

    changes: str
    for_check: str
    explanation: str


@dataclass(frozen=True)
class OriginalArchitecture:
    """The code of a family's original models, for verification; dimensions have the family's own type.

    Attributes:
        repository: The authors' repository, for torch.hub.
        build: Builds the model of certain dimensions on the current device, with the original's parameter names, so
            that ``load_state_dict(strict=True)`` accepts the original's file. If the model has a ``weights_dtype``, it
            is set to the dtype of the weights before they are converted to that of the computation.
        load: Loads the published ``model`` from ``(repository, source)`` through torch.hub, with its authors' own code
            and without weights.
        states: Runs either of the two on ``(model, pixels, as_transformers)`` and yields the output of every layer.
        prefix_tokens: Names and numbers of the tokens before the patches, in their order, (B, number, D) each.
        known_difference: Returns how the original of certain dimensions differs from transformers by design, at its
            native size or at another one (``is_native``). ``states`` computes like transformers if it is called with
            ``as_transformers``.
        layers: Returns the layers of transformers' model, whose outputs ``states`` yields as "layer 0", "layer 1", …
            The first one's input is "embeddings".
    """

    repository: str
    build: Callable[[Any], Any]
    load: Callable[[str, str, Model], Any]
    states: "Callable[[Any, Tensor, bool], Iterator[tuple[str, Tensor]]]"
    prefix_tokens: Callable[[Any], Mapping[str, int]]
    known_difference: Callable[[Any, bool], KnownDifference | None] = lambda dimensions, is_native: None
    layers: Callable[[Any], Sequence[Any]] = first_module_list


def original_of(family_name: str) -> OriginalArchitecture:
    """Import a family's module, and torch with it."""
    module = importlib.import_module(f"{__name__}.{family_name}")
    architecture: OriginalArchitecture = module.ARCHITECTURE
    return architecture
