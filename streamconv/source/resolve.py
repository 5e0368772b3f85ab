"""Resolves what the user typed (a model's name, or the path or URL of a checkpoint) to locations.

A model's files are those in torch.hub's cache or, if they are not there, those at their published URLs.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from streamconv.errors import SourceMissingError, UsageError, located
from streamconv.families.base import Model, RemoteFile
from streamconv.families.near_names import did_you_mean, near_names
from streamconv.families.registry import find_model, is_model, near_models, suggest_models
from streamconv.files.address import Address, Location, parse_location

MAX_COMPARED = 1000  # names in a folder that a missing file's name is compared with


@dataclass(frozen=True)
class Source:
    """The locations of a backbone's file and perhaps a head's file, and the model that the user named.

    ``origins`` are the URLs that local files were downloaded from, by role. ``select`` is the prefix of the
    backbone's names and ``num_heads`` the number of attention heads, if the user gave them. ``is_synthetic``: the
    weights are random and were generated for this run.
    """

    backbone: Location
    head: Location | None = None
    model: Model | None = None
    origins: Mapping[str, Address] = field(default_factory=dict)
    select: str | None = None
    num_heads: int | None = None
    is_synthetic: bool = False

    @property
    def locations(self) -> dict[str, Location]:
        """The locations by role: "backbone" and, if there is one, "head"."""
        return {"backbone": self.backbone, **({"head": self.head} if self.head is not None else {})}

    @property
    def is_remote(self) -> bool:
        """True if any of the files is at a URL."""
        return any(isinstance(location, Address) for location in self.locations.values())


def torch_hub_cache() -> Path:
    """Return the folder in which torch.hub keeps checkpoints (https://docs.pytorch.org/docs/stable/hub.html)."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def resolve_source(
    source: str | os.PathLike[str],
    head: str | os.PathLike[str] | None = None,
    select: str | None = None,
    num_heads: int | None = None,
) -> Source:
    """Find the files that ``source`` refers to. A model's name takes precedence over a file of that name.

    Raises:
        SourceMissingError: the file does not exist.
        UsageError: ``source`` is not a file, a URL or a known model, or a head is given for a model without one.
    """
    name = os.fspath(source)
    if not name:
        raise UsageError("SOURCE is empty. Give a model's name, or the path or URL of a checkpoint.")
    given_head = None if head is None else parse_location(head)
    _require_exists(given_head)
    if not is_model(name):
        location = parse_location(source)
        is_word = (
            isinstance(source, str) and isinstance(location, Path) and len(location.parts) == 1 and not location.suffix
        )
        if is_word and not os.path.exists(name):
            raise UsageError(f"{name} is neither a file nor a model that streamconv knows. {suggest_models(name)}")
        _require_exists(location)
        return Source(location, given_head, select=select, num_heads=num_heads)
    family, model = find_model(name)
    if given_head is not None and model.head is None:
        others = [each.name for each in family.models if each.head is not None and each.backbone == model.backbone]
        raise UsageError(f"{name} has no head.{f' The model with one is {others[0]}.' if others else ''}")
    if model.head is not None and given_head is None:
        given_head = _cached_or_remote(model.head)
    return Source(_cached_or_remote(model.backbone), given_head, model, select=select, num_heads=num_heads)


def _require_exists(location: Location | None) -> None:
    if not isinstance(location, Path) or os.path.exists(location):
        return
    files = {Path(name).stem: name for name in _names_in(location.parent)}
    near = [f"`{location.with_name(files[stem])}`" for stem in near_names(location.stem, files)]
    models = [f"the model {name}" for name in near_models(location.stem)[:1]]
    with located(location):
        raise SourceMissingError(f"{location}: there is no such file. {did_you_mean(near or models)}".rstrip())


def _names_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, MAX_COMPARED)]
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return []


def _cached_or_remote(file: RemoteFile) -> Location:
    path = torch_hub_cache() / file.filename
    return path if os.path.exists(path) else Address(file.url)
