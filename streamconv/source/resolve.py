"""Resolves what the user typed (a model's name, or the path or URL of a checkpoint) to locations.

A model's file is the one that streamconv downloaded from its published URL, or else the one in torch.hub's cache, or
else the one at the URL.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from streamconv.errors import SourceMissingError, UsageError, located
from streamconv.families.base import Model, RemoteFile
from streamconv.families.near_names import did_you_mean, near_names
from streamconv.families.registry import (
    find_model,
    is_hub_name,
    is_model,
    near_models,
    suggest_models,
)
from streamconv.files.address import Address, Location, parse_location
from streamconv.files.local import exists
from streamconv.formats.foreign.folders import missing_link
from streamconv.source.cache import Download, own_path, torch_hub_cache

MAX_COMPARED = 1000  # names in a folder that a missing file's name is compared with
# OWNER/NAME on the Hub. A suffix of letters is that of a file; a name may end in a version, such as v1.5.
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-]([\w-]|\.(?![A-Za-z]+$))*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """The locations of a backbone's file and perhaps a head's file, and the model that the user named.

    ``origins`` are the URLs that local files were downloaded from, by role. ``select`` is the prefix of the
    backbone's names, ``head_select`` that of the head's, and ``num_heads`` the number of attention heads, if the user
    gave them. ``is_synthetic``: the weights are random and were generated for this run. ``notes`` are assumptions
    about the files. ``digests`` are the sha256 of local files by role, if they were computed: see `compute_digests`.
    """

    backbone: Location
    head: Location | None = None
    model: Model | None = None
    origins: Mapping[str, Address] = field(default_factory=dict)
    select: str | None = None
    head_select: str | None = None
    num_heads: int | None = None
    is_synthetic: bool = False
    notes: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def locations(self) -> dict[str, Location]:
        """The locations by role: "backbone" and, if there is one, "head"."""
        return {"backbone": self.backbone, **({"head": self.head} if self.head is not None else {})}

    @property
    def is_remote(self) -> bool:
        """True if any of the files is at a URL."""
        return any(isinstance(location, Address) for location in self.locations.values())


def resolve_source(
    source: str | os.PathLike[str],
    head: str | os.PathLike[str] | None = None,
    select: str | None = None,
    num_heads: int | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
) -> Source:
    """Find the files that ``source`` refers to.

    A model's own name, such as dinov2_vitb14, takes precedence over a file of that name. Its name on the Hub, such as
    dinov2-base, does not, because converted folders have such names.

    Args:
        output: The folder that the source is, or was, converted into. It is never the source.

    Raises:
        SourceMissingError: the file does not exist.
        UsageError: ``source`` is not a file, a URL or a known model, or a head is given for a model without one.
    """
    name = os.fspath(source)
    if not name:
        raise UsageError("SOURCE is empty. Give a model's name, or the path or URL of a checkpoint.")
    given_head = None if head is None else parse_location(head)
    _require_exists(given_head)
    if not _is_model(source, output):
        location = parse_location(source)
        is_word = isinstance(source, str) and os.path.basename(name) == name and not os.path.splitext(name)[1]
        if is_word and isinstance(location, Path) and not os.path.exists(name):
            near = did_you_mean([*_near_paths(location), *near_models(name)][:3]) or suggest_models(name)
            raise UsageError(f"{name} is neither a file nor a model that streamconv knows. {near}")
        _require_exists(location)
        notes = [f"{name} is a path here; a model is published under this name, too"] if is_hub_name(name) else []
        notes += _page_notes({source: location, head: given_head})
        return Source(location, given_head, select=select, num_heads=num_heads, notes=tuple(notes))
    family, model = find_model(name)
    if given_head is not None and model.head is None:
        others = [each.name for each in family.models if each.head is not None and each.backbone == model.backbone]
        raise UsageError(f"{name} has no head.{f' The model with one is {others[0]}.' if others else ''}")
    if model.head is not None and given_head is None:
        given_head = _cached_or_remote(model.head)
    backbone, notes = _cached_or_remote(model.backbone), _page_notes({head: given_head})
    return Source(backbone, given_head, model, select=select, num_heads=num_heads, notes=tuple(notes))


def _page_notes(locations: Mapping[str | os.PathLike[str] | None, Location | None]) -> list[str]:
    """Name the files whose pages the user gave, and which are read instead; see `direct_url`."""
    return [
        f"read from {location}, the file that the given page is about"
        for given, location in locations.items()
        if isinstance(given, str) and isinstance(location, Address) and location.url != given
    ]


def _is_model(source: str | os.PathLike[str], output: str | os.PathLike[str] | None) -> bool:
    """Return whether a source is a model's name, and not a path."""
    if not isinstance(source, str) or not is_hub_name(source):
        return is_model(os.fspath(source))
    return not os.path.exists(source) or (output is not None and os.path.abspath(source) == os.path.abspath(output))


def default_output(source: str | os.PathLike[str]) -> str | None:
    """Return the name of the folder that a model is converted into; None if ``source`` is not a model's name."""
    is_name = isinstance(source, str) and (is_hub_name(source) or is_model(source))
    return find_model(os.fspath(source))[1].published_name if is_name else None


def _require_exists(location: Location | None) -> None:
    if not isinstance(location, Path):
        return
    with located(location):
        if exists(location):
            return
    if missing := missing_link(location):
        with located(location):
            raise SourceMissingError(f"{location} {missing}")
    near = _near_paths(location) or [f"the model {name}" for name in near_models(location.stem)[:1]]
    fix = did_you_mean(near)
    if _is_repository(location):
        fix = f"For a repository on the Hub, give the URL of its file: hf://{location}/model.safetensors. {fix}"
    with located(location):
        raise SourceMissingError(f"{location}: there is no such file. {fix}".rstrip())


def _near_paths(path: Path) -> list[str]:
    """Return the paths beside ``path`` that it may stand for, quoted for a message."""
    files = {Path(name).stem: name for name in _names_in(path.parent)}
    return [f"`{path.with_name(files[stem])}`" for stem in near_names(path.stem, files)]


def _is_repository(path: Path) -> bool:
    """Return whether a path that does not exist may be a repository on the Hub, OWNER/NAME."""
    return bool(_REPOSITORY.fullmatch(path.as_posix())) and not os.path.exists(path.parent)


def _names_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, MAX_COMPARED)]
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return []


def _cached_or_remote(file: RemoteFile) -> Location:
    """Return the copy that was downloaded from the URL, or else the file in torch.hub's cache, or else the URL."""
    address, path = Address(file.url), torch_hub_cache() / file.filename
    for copy in (path, own_path(address)):
        record = Download.read(copy)
        if record is not None and record.is_published:
            return copy
    return path if os.path.exists(path) else address
