"""TODO source.resolve"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamconv.errors import (
    SourceMissingError,
    UsageError,
)
from streamconv.families.base import Model, RemoteFile
from streamconv.families.registry import find_model
from streamconv.files.address import Address, Location, parse_location


@dataclass(frozen=True)
class Source:
    """A backbone's file, perhaps a head's, and the model that they are said to be.

    ``origins`` are, by role, the addresses of files that are known to have come from there. ``select``,
    the prefix of the backbone's names, and ``num_heads``, of attention, are what the user says of them.
    """

    backbone: Location
    head: Location | None = None
    model: Model | None = None
    origins: Mapping[str, Address] = field(default_factory=dict)
    select: str | None = None
    num_heads: int | None = None

    @property
    def places(self) -> dict[str, Location]:
        """By role: "backbone" and, where there is one, "head"."""
        return {"backbone": self.backbone, **({"head": self.head} if self.head is not None else {})}

    @property
    def is_remote(self) -> bool:
        """Whether any of it lies at an address."""
        return any(isinstance(place, Address) for place in self.places.values())


def torch_hub_cache() -> Path:
    """Where torch.hub keeps checkpoints (https://docs.pytorch.org/docs/stable/hub.html), torch unimported."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def resolve_source(
    source: str | os.PathLike[str],
    head: str | os.PathLike[str] | None = None,
    select: str | None = None,
    num_heads: int | None = None,
) -> Source:
    """Find the files that ``source`` means. A model's name wins over a file of that name.

    Raises:
        SourceMissingError: the file is not there.
        UsageError: ``source`` is no file, no address and no known model, or has a head that it needs not.
    """
    name = os.fspath(source)
    if not name:
        raise UsageError("SOURCE is empty. Give a model's name, a checkpoint file or its address.")
    given_head = None if head is None else parse_location(head)
    _require_exists(given_head)
    try:
        _, model = find_model(name)
    except UsageError:
        place = parse_location(source)
        is_word = isinstance(source, str) and isinstance(place, Path) and len(place.parts) == 1 and not place.suffix
        if is_word and not os.path.exists(name):
            raise
        _require_exists(place)
        return Source(place, given_head, select=select, num_heads=num_heads)
    if given_head is not None and model.head is None:
        raise UsageError(f"{name} has no head. The model with a linear head is {name}_1layer.")
    if model.head is not None and given_head is None:
        given_head = _cached_or_remote(model.head)
    return Source(_cached_or_remote(model.backbone), given_head, model, select=select, num_heads=num_heads)


def _require_exists(place: Location | None) -> None:
    if isinstance(place, Path) and not os.path.exists(place):
        raise SourceMissingError(f"{place}: there is no such file.")


def _cached_or_remote(file: RemoteFile) -> Location:
    path = torch_hub_cache() / file.filename
    return path if os.path.exists(path) else Address(file.url)
