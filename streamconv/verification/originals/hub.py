"""Loads the authors' own models with torch.hub, which runs the code of their repository."""

from typing import Any

import torch
from torch import nn


def load_without_weights(repository: str, entry: str, source: str, **arguments: Any) -> Any:
    """Return what the function ``entry`` of the repository's hubconf.py makes. ``source`` is "github" or "local"."""
    load: Any = torch.hub.load
    return load(repository, entry, source=source, trust_repo=True, verbose=False, pretrained=False, **arguments)


def require_model(loaded: Any, attribute: str) -> nn.Module:
    """Return a loaded model, which has an attribute that the authors' models have.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(loaded, nn.Module) or not hasattr(loaded, attribute):
        raise TypeError(f"it returns a {type(loaded).__name__}, which is not the authors' model")
    return loaded
