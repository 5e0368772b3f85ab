"""What a user's SOURCE means: a model's name, a checkpoint file, or its address.

A model's files are those that torch.hub keeps, else those at their authors' addresses.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamconv.checkpoint import Checkpoint, open_checkpoint
from streamconv.checkpoint.addresses import Address, Place, place_of
from streamconv.checkpoint.storage import read_small
from streamconv.errors import (
    ChangedError,
    CorruptError,
    MappingError,
    NetworkError,
    NotACheckpointError,
    SourceError,
    SourceMissingError,
    TruncatedError,
    UsageError,
)
from streamconv.families import HEAD_PREFIX, Model, RemoteFile, find_model
from streamconv.progress import Progress, ignore_progress
from streamconv.selection import Selection, find_backbone
from streamconv.tensors import AnyTensor, joined, parts_of


@dataclass(frozen=True)
class Source:
    """A backbone's file, perhaps a head's, and the model that they are said to be.

    ``origins`` are, by role, the addresses of files that are known to have come from there. ``select``,
    the prefix of the backbone's names, and ``num_heads``, of attention, are what the user says of them.
    """

    backbone: Place
    head: Place | None = None
    model: Model | None = None
    origins: Mapping[str, Address] = field(default_factory=dict)
    select: str | None = None
    num_heads: int | None = None

    @property
    def places(self) -> dict[str, Place]:
        """By role: "backbone" and, where there is one, "head"."""
        return {"backbone": self.backbone, **({"head": self.head} if self.head is not None else {})}

    @property
    def is_remote(self) -> bool:
        """Whether any of it lies at an address."""
        return any(isinstance(place, Address) for place in self.places.values())


def hub_folder() -> Path:
    """Where torch.hub keeps checkpoints (https://docs.pytorch.org/docs/stable/hub.html), torch unimported."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def locate(
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
    given_head = None if head is None else place_of(head)
    _require_there(given_head)
    try:
        _, model = find_model(name)
    except UsageError:
        place = place_of(source)
        is_word = isinstance(source, str) and isinstance(place, Path) and len(place.parts) == 1 and not place.suffix
        if is_word and not os.path.exists(name):
            raise
        _require_there(place)
        return Source(place, given_head, select=select, num_heads=num_heads)
    if given_head is not None and model.head is None:
        raise UsageError(f"{name} has no head. The model with a linear head is {name}_1layer.")
    if model.head is not None and given_head is None:
        given_head = _kept(model.head)
    return Source(_kept(model.backbone), given_head, model, select=select, num_heads=num_heads)


def _require_there(place: Place | None) -> None:
    if isinstance(place, Path) and not os.path.exists(place):
        raise SourceMissingError(f"{place}: there is no such file.")


def _kept(file: RemoteFile) -> Place:
    path = hub_folder() / file.filename
    return path if os.path.exists(path) else Address(file.url)


def _is_checkable(tensors: Mapping[str, AnyTensor]) -> bool:
    return all(part.record.crc32 is not None for tensor in tensors.values() for part in parts_of(tensor))


@dataclass(frozen=True)
class OpenSource:
    """A source's tensors, a head's under `HEAD_PREFIX`, and the checkpoints they come from by role.

    ``tensors`` are the selected ones, by their names in the family's rules; ``selection`` knows what files call them.
    """

    source: Source
    tensors: Mapping[str, AnyTensor]
    checkpoints: Mapping[str, Checkpoint]
    selection: Selection

    @property
    def where(self) -> str:
        return " with ".join(str(path) for path in (self.source.backbone, self.source.head) if path)

    @property
    def is_remote(self) -> bool:
        return any(checkpoint.is_remote for checkpoint in self.checkpoints.values())

    @property
    def said(self) -> dict[str, Any]:
        """What `plan.make_plan` is told beside the tensors."""
        said = (self.source.num_heads, self.selection.config.get("num_attention_heads"))
        num_heads = next((number for number in said if type(number) is int), None)
        return {"model": self.source.model, "num_heads": num_heads, "selection": self.selection}

    @property
    def is_checkable(self) -> bool:
        """Whether every tensor has a CRC-32 in its file."""
        return _is_checkable(self.tensors)

    def describe(self) -> dict[str, dict[str, object]]:
        """For the manifest: file names, sizes in bytes, and fingerprints (see `torch_zip.read_index`).

        A fingerprint stands for the weights only where they carry CRC-32s. Elsewhere the files' times,
        or what their servers call this version, go with it, so that another file of the same names and
        shapes is noticed.
        """
        places = self.source.places
        origins = {role: place for role, place in places.items() if isinstance(place, Address)}
        origins |= self.source.origins
        return {
            role: {
                "file": checkpoint.names[0] if len(checkpoint.names) == 1 else places[role].name,
                **({"address": str(origins[role])} if role in origins else {}),
                "size": checkpoint.size,
                "fingerprint": checkpoint.fingerprint,
                **({} if _is_checkable(checkpoint) else checkpoint.version),
            }
            for role, checkpoint in self.checkpoints.items()
        }


@contextmanager
def opened(source: Source, progress: Progress = ignore_progress, *, is_exact: bool = True) -> Iterator[OpenSource]:
    """The source's indexes, read; ``is_exact`` and errors as `open_checkpoint`'s."""

    def notify(text: str) -> None:
        progress(text, 0, 1, "steps")

    with ExitStack() as stack:
        stack.enter_context(_kept_copies_named(source))
        checkpoints: dict[str, Checkpoint] = {}
        for role, place in source.places.items():
            try:
                checkpoints[role] = stack.enter_context(open_checkpoint(place, is_exact=is_exact, notify=notify))
            except NetworkError as error:
                if source.model is None:
                    raise
                path = hub_folder() / place.name
                raise NetworkError(f"{error}\nIf you have {place.name}, put it at\n  {path}") from error
        backbone = checkpoints["backbone"]
        heads = [f"unexpected: {key}" for key in backbone if key.startswith(HEAD_PREFIX)]
        if heads:
            raise MappingError(f"{source.backbone} is no backbone alone. Save the head's weight and bias apart:", heads)
        selection = find_backbone(backbone, str(source.backbone), source.select)
        if selection.is_converted and isinstance(source.backbone, Path):
            path = source.backbone
            selection = replace(selection, config=read_config(path if os.path.isdir(path) else path.parent))
        tensors = {key: joined([backbone[name] for name in names]) for key, names in selection.names.items()}
        if selection.is_converted and source.head is not None and HEAD_PREFIX + "weight" in tensors:
            raise UsageError(f"{source.backbone} is a classifier, and has its head. Leave --head out.")
        if source.head is not None:
            head = checkpoints["head"]
            if head.keys() != {"weight", "bias"}:
                raise MappingError(
                    f"{source.head} is no linear head, which holds weight and bias. It holds:",
                    [f"{key} {list(tensor.info.shape)}" for key, tensor in head.items()],
                )
            tensors |= {HEAD_PREFIX + key: tensor for key, tensor in head.items()}
        yield OpenSource(source, tensors, checkpoints, selection)


@contextmanager
def _kept_copies_named(source: Source) -> Iterator[None]:
    """What is wrong with a file that torch.hub keeps is mended by deleting it; then it is fetched again."""
    try:
        yield
    except (CorruptError, TruncatedError, NotACheckpointError) as error:
        kept = [path for path in source.places.values() if isinstance(path, Path) and path.parent == hub_folder()]
        named = [path for path in kept if str(path) in str(error) or path.name in str(error)]
        if isinstance(error, ChangedError) or not named:
            raise
        hint = f"It is torch.hub's copy. Delete it to have it fetched again:\n  {named[0]}"
        raise type(error)(f"{error}\n{hint}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json; an empty one where that is none."""
    try:
        config = json.loads(read_small(folder / "config.json"))
    except (SourceError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
