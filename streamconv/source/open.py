"""Opens a source: reads the indexes of its files and selects the tensors to convert. No weight is read."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from streamconv.errors import (
    ChangedError,
    NetworkError,
    SourceError,
    UsageError,
)
from streamconv.families.classifier_heads import find_layers, head_in_file
from streamconv.families.left_out import left_out_beside_head
from streamconv.families.prefixes import shown
from streamconv.families.selection import Selection, find_backbone
from streamconv.files.address import Address, Location
from streamconv.files.base import FileRef
from streamconv.files.folders import file_in, read_small
from streamconv.files.inline import is_inline
from streamconv.files.local import LocalFile
from streamconv.files.reader import Reader
from streamconv.formats.checkpoint import Checkpoint, open_checkpoint
from streamconv.formats.limits import parse_small_json
from streamconv.formats.shards import refuse_shard
from streamconv.output.manifest import CHANGE_TIME, SourceFile
from streamconv.planning.plan import CONFIG_NAME
from streamconv.source.advice import named_torch_hub_copy
from streamconv.source.authors import Authorship, authorship
from streamconv.source.cache import torch_hub_cache
from streamconv.source.resolve import Source
from streamconv.source.small_files import with_small_files
from streamconv.tensors.expressions import Expression


def _has_checksums(tensors: Mapping[str, Expression]) -> bool:
    return all(leaf.record.crc32 is not None for tensor in tensors.values() for leaf in tensor.leaves())


@dataclass(frozen=True)
class OpenSource:
    """A source's tensors, including a head's (`Family.join_head`), and the checkpoints that they come from, by role.

    ``tensors`` are the selected ones, by their names in the family's rules; ``selection`` maps these to the names in
    the files. Without its ``checkpoints``, which are open files, a source can be sent to another process: there,
    ``reader`` opens the files again.
    """

    source: Source
    tensors: Mapping[str, Expression]
    checkpoints: Mapping[str, Checkpoint]
    selection: Selection

    @property
    def where(self) -> str:
        return " with ".join(str(path) for path in (self.source.backbone, self.source.head) if path)

    @property
    def is_remote(self) -> bool:
        return any(isinstance(ref.location, Address) for ref in self._files())

    @property
    def local_paths(self) -> dict[str, list[Path]]:
        """The paths of the files on this machine that tensors come from, by role."""
        paths: dict[str, list[Path]] = {}
        for ref, role in self._files().items():
            if isinstance(ref.location, Path):
                paths.setdefault(role, []).append(ref.location)
        return paths

    @property
    def classes(self) -> int | None:
        """The number of a classifier's classes; None for a backbone alone."""
        head = self.selection.family.split_head(self.tensors)[1]
        return next((tensor.info.shape[0] for tensor in head.values() if tensor.info.shape), None)

    @cached_property
    def reader(self) -> Reader:
        """A reader for the tensors, usable as long as the source is open."""
        files = (file for checkpoint in self.checkpoints.values() for file in checkpoint.files)
        return Reader(files, accepts_unversioned=True)  # verification compares what it reads with the output

    def _files(self) -> dict[FileRef, str]:
        """Return the files that tensors come from, with the role of each. Constants are not in files."""
        return {
            leaf.record.file: "backbone" if key in self.selection.names else "head"
            for key, tensor in self.tensors.items()
            for leaf in tensor.leaves()
            if not is_inline(leaf.record.file)
        }

    @property
    def has_checksums(self) -> bool:
        """True if every tensor has a CRC-32 in its file."""
        return _has_checksums(self.tensors)

    def require_in_place(self) -> None:
        """Check that the paths of local files still lead to the files that were opened.

        Raises:
            ChangedError: one does not.
        """
        for file in (file for checkpoint in self.checkpoints.values() for file in checkpoint.files):
            if isinstance(file, LocalFile):
                with closing(LocalFile(file.path)) as now:
                    if now.ref != file.ref:
                        raise ChangedError(f"{file.where} was changed while it was read. Run the same command again.")

    def describe(self) -> dict[str, SourceFile]:
        """Describe the checkpoints by role, for the manifest."""
        locations, origins, authors = self.source.locations, self.source.origins, self._authorship()
        return {
            role: SourceFile(
                file=checkpoint.names[0] if len(checkpoint.names) == 1 else locations[role].name,
                size=checkpoint.size,
                fingerprint=checkpoint.fingerprint,
                address=str(origins[role]) if role in origins else authors[role].address or None,
                synthetic=self.source.is_synthetic,
                published=authors[role].is_published,
                found_in_cache=authors[role].found is not None,
                sha256=authors[role].sha256,
                version=self._version(role, checkpoint),
            )
            for role, checkpoint in self.checkpoints.items()
        }

    def _version(self, role: str, checkpoint: Checkpoint) -> Mapping[str, tuple[str | int | None, ...]]:
        if _has_checksums(checkpoint):
            return {}
        # Downloading the same bytes again keeps a copy's mtime (see `download`), but changes its ctime.
        ignored = CHANGE_TIME if role in self.source.origins else None
        return {key: value for key, value in checkpoint.version.items() if key != ignored}

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions about the files, for the notes of the plan."""
        authors = self._authorship().values()
        found = (each.found for each in authors)
        return (
            *self.source.notes,
            *(
                f"the sha256 of {each.contradicted.filename} begins with {each.sha256[:8]}, not with the digits in its "
                f"name, so it is not the file that its authors publish at {each.contradicted.url}, or it is damaged"
                for each in authors
                if each.contradicted is not None and not self.source.is_synthetic
            ),
            *(
                f"{file.filename} was found in torch.hub's cache and was not downloaded by streamconv, so it may not "
                f"be the file that its authors publish at {file.url}"
                for file in found
                if file is not None and not self.source.is_synthetic
            ),
        )

    def _authorship(self) -> dict[str, Authorship]:
        locations, digests = self.source.locations, self.source.digests
        return {
            role: authorship(locations[role], each, digests.get(role, "")) for role, each in self.checkpoints.items()
        }


@contextmanager
def open_source(
    source: Source,
    *,
    read_local_headers: bool = True,
    opened: Mapping[str, Checkpoint] | None = None,
    reads_small_files: bool = True,
    is_offline: bool = False,
) -> Iterator[OpenSource]:
    """Read the source's indexes.

    Args:
        read_local_headers: See `open_checkpoint`.
        opened: Checkpoints that are already open, by role; they stay open.
        reads_small_files: Read the configuration beside a model that was converted before. A plan has it already.
        is_offline: Of a downloaded file, read it beside the copy, not where the file came from.

    Raises:
        SourceError: a file cannot be read, or does not hold exactly one backbone of a known family.
        UsageError: a head is given for a model that takes none, or there is no backbone under ``source.select``.
    """
    with ExitStack() as stack:
        stack.enter_context(named_torch_hub_copy(source))
        checkpoints: dict[str, Checkpoint] = {**(opened or {})}
        for role, location in source.locations.items():
            if role in checkpoints:
                continue
            refuse_shard(location)
            try:
                checkpoints[role] = stack.enter_context(
                    open_checkpoint(location, read_local_headers=read_local_headers)
                )
            except NetworkError as error:
                if source.model is None:
                    raise
                path = torch_hub_cache() / location.name
                raise NetworkError(f"{error} If you have {location.name}, put it at {path}") from error
        backbone = checkpoints["backbone"]
        head_select = source.head_select if source.head is None else None
        selection = find_backbone(backbone, str(source.backbone), source.select, head_select)
        tensors = selection.tensors(backbone, str(source.backbone))
        if reads_small_files and source.model is None:
            infos = {key: tensor.info for key, tensor in tensors.items()}
            origin = None if is_offline else source.origins.get("backbone")
            place = origin or backbone.folder or source.backbone
            selection = with_small_files(selection, place, infos)
        if source.head is not None:
            head_names = _find_head(tensors, checkpoints["head"], source, selection)
            tensors |= {key: checkpoints["head"][name] for key, name in head_names.items()}
            selection = replace(
                selection,
                head_names=head_names,
                unproved=(*selection.unproved, *_beside_head(head_names, checkpoints, selection)),
            )
        yield OpenSource(source, tensors, checkpoints, selection)


def _find_head(
    tensors: Mapping[str, Expression], checkpoint: Checkpoint, source: Source, selection: Selection
) -> dict[str, str]:
    """Return the names of the head's tensors in its file, by their keys in the family's rules."""
    family = selection.family
    if family.classifier_head is None:
        raise UsageError(f"{source.backbone} is a {family.name} model, which takes no head. Omit --head.")
    if family.split_head(tensors)[1]:
        raise UsageError(
            f"{source.backbone} is a classifier and already has its head. Omit --head, or leave its own head out with "
            f"--select {shown(selection.prefix)}."
        )
    infos = {name: tensor.info for name, tensor in checkpoint.items()}
    backbone = {key: tensor.info for key, tensor in tensors.items()}
    return family.join_head({}, head_in_file(infos, source.head_select, str(source.head), family, backbone))


def _beside_head(
    head_names: Mapping[str, str], checkpoints: Mapping[str, Checkpoint], selection: Selection
) -> list[str]:
    """Return what is assumed about other weights in the head's file."""
    infos, family = {name: tensor.info for name, tensor in checkpoints["head"].items()}, selection.family
    layers = find_layers(infos, family.classifier_head) if family.classifier_head is not None else {}
    return list(filter(None, [left_out_beside_head(family.split_head(head_names)[1], infos, layers.values(), family)]))


def read_config(folder: Location) -> dict[str, Any]:
    """Read a model's config.json; return an empty one if there is none, or none that can be read."""
    try:
        config = parse_small_json(read_small(file_in(folder, CONFIG_NAME)))
    except (SourceError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
