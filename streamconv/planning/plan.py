"""The plan of a conversion: every byte that will be written, decided from the indexes alone.

It is pure data. Files are named by `FileRef` and are not open, so that a plan can be compared, pickled, saved as JSON
(`plan_json`) and executed by another process.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal, TypedDict, cast

from streamconv.errors import ChangedError
from streamconv.families.base import Family, Model
from streamconv.families.image_processors import PixelSteps, UnknownStepsError
from streamconv.families.registry import family_named
from streamconv.families.selection import Skipped
from streamconv.files.base import FileRef
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.planning.repeats import distinct_bytes
from streamconv.planning.shards import Shard, to_json
from streamconv.tensors.computed import Cast as CastExpression
from streamconv.tensors.expressions import Record
from streamconv.tensors.info import DTYPES, CastDtype, DtypeCode, TensorInfo

Cast = TypedDict("Cast", {"from": str, "to": CastDtype})
"""torch's names of the dtypes that tensors are cast from, joined by "and" if there are several, and to."""

CONFIG_NAME = "config.json"
IMAGE_PROCESSOR_NAME = "preprocessor_config.json"
Origin = Literal["family", "source", "beside", "user", "edited"]
"""Whose an image processor is: that of the family's published models, the source's own, one that the config.json beside
the weights describes, one that the user gave, or one that the user edited after the conversion."""


class Names(TypedDict):
    """The published model that a checkpoint is, or the one whose shapes it has. At most one is given."""

    model: str | None
    shaped_like: str | None


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """One source tensor and the targets that it becomes: one under a new name, or several along dim 0."""

    source: str
    info: TensorInfo
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The output of a conversion.

    ``model_name`` is None if no published model has these dimensions, or if several have and the file's name does not
    tell which it is. ``is_published``: the user or the file's name states that it is this model; otherwise, only the
    shapes are the same. ``assumed_heads`` is a number of attention heads that neither a published model nor a
    config.json confirms, None if nothing is assumed. ``dimensions`` is a dataclass of the family.
    ``image_processor`` is None if none is written; ``image_processor_from`` states whose it is.
    ``small_files`` maps the names of config.json and other small files to their bytes; ``index`` holds the bytes of the
    shards' index, None for a single file. ``notes`` are assumptions that the tensors do not confirm; ``unproved`` are
    those that change what the model computes, and that nothing confirms. ``skipped`` is the part of the source that is
    not converted. ``filled`` maps targets that the source does not have to their
    constant values, and ``block_chunks`` is the number of lists that the source's blocks are in, 0 for one plain list.

    Large fields are left out of the plan's ``repr``.
    """

    family_name: str
    model_name: str | None
    is_published: bool
    assumed_heads: int | None
    dimensions: Any
    architecture: str
    mapping: tuple[MappedTensor, ...] = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    image_processor: Mapping[str, Any] | None = field(repr=False)
    small_files: Mapping[str, bytes] = field(repr=False)
    index: bytes | None = field(repr=False)
    image_processor_from: Origin = "family"
    notes: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    filled: Mapping[str, float] = field(default_factory=dict)
    block_chunks: int = 0

    @property
    def family(self) -> Family:
        return family_named(self.family_name)

    @property
    def model(self) -> Model | None:
        """The published model that it is or whose shapes it has: see ``is_published``."""
        return next((model for model in self.family.models if model.name == self.model_name), None)

    @property
    def pixel_steps(self) -> PixelSteps | None:
        """The steps by which the image processor makes pixels that the model takes; None if none are known."""
        if self.family.image_processor is None or self.image_processor is None:
            return None
        try:
            steps = self.family.image_processor.pixel_steps(self.image_processor)
        except UnknownStepsError:
            return None
        return steps if len(steps.mean) in (0, self.channels) else None

    @property
    def channels(self) -> int:
        """The number of channels of the images that the model takes."""
        return int(self.config.get("num_channels", 3))

    @property
    def native_size(self) -> int:
        """The height and width of the images whose patches have position embeddings of their own."""
        return _side(self.config["image_size"])

    @property
    def patch_size(self) -> int:
        """The height and width, in pixels, of the image area of a patch token."""
        return _side(self.family.patch_size(self.config))

    @property
    def filenames(self) -> list[str]:
        """The names of all files that will be written except the manifest."""
        shards = [shard.filename for shard in self.shards]
        return [*shards, *self.small_files, *([INDEX_NAME] if self.index is not None else [])]

    @property
    def size(self) -> int:
        """Total size in bytes of all files except the manifest."""
        small = sum(map(len, self.small_files.values())) + len(self.index or b"")
        return sum(shard.size for shard in self.shards) + small

    @property
    def weights(self) -> int:
        """Total size in bytes of all tensors as they are written, without headers."""
        return sum(tensor.info.nbytes for shard in self.shards for _, tensor in shard.tensors)

    @property
    def source_bytes(self) -> int:
        """The number of bytes that the weights are made from, each counted once; see `distinct_bytes`."""
        return distinct_bytes(tensor for shard in self.shards for _, tensor in shard.tensors)

    @property
    def parameters(self) -> int:
        return sum(t.info.nbytes // t.info.itemsize for shard in self.shards for _, t in shard.tensors)

    @property
    def cast_to(self) -> DtypeCode | Literal[""]:
        """The code of the dtype that tensors are cast to; empty if all stay as they are stored."""
        return next((tensor.info.dtype for tensor in self._casts()), "")

    @property
    def cast(self) -> "Cast | None":
        """torch's names of the dtypes that tensors are cast "from" and "to"; None if all stay as they are stored."""
        if not self.cast_to:
            return None
        stored = {tensor.of.info.dtype for tensor in self._casts()}
        return {
            "from": " and ".join(sorted(DTYPES[dtype].torch for dtype in stored)),
            "to": cast(CastDtype, DTYPES[self.cast_to].torch),
        }

    def _casts(self) -> Iterator[CastExpression]:
        tensors = (tensor for shard in self.shards for _, tensor in shard.tensors)
        return (tensor for tensor in tensors if isinstance(tensor, CastExpression))

    @property
    def title(self) -> str:
        """A name for the checkpoint in messages."""
        return self.family.title_of(**self.names)

    @property
    def names(self) -> "Names":
        """The published model that it is, or the one whose shapes it has, for JSON."""
        name = self.model_name
        return {"model": name, "shaped_like": None} if self.is_published else {"model": None, "shaped_like": name}

    @property
    def labels_digest(self) -> str:
        """sha256 of a classifier's labels."""
        return sha256(json.dumps(self.config.get("id2label")).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides the output except labels: headers, positions of tensors, small files."""
        config = {key: value for key, value in self.config.items() if key not in ("id2label", "label2id")}
        digest = sha256(to_json(config))
        for name, data in self.small_files.items():
            digest.update(data if name != CONFIG_NAME else b"")
        for shard in self.shards:
            digest.update(shard.filename.encode() + shard.header)
            for _, tensor in shard.tensors:
                digest.update(tensor.fingerprint.encode())
        return digest.hexdigest()

    def with_labels(self, labels: Sequence[str]) -> "Plan":
        """Return the plan with other labels for the same number of classes."""
        config = {**self.config, **label_config(labels)}
        return replace(self, config=config, small_files={**self.small_files, CONFIG_NAME: to_json(config)})

    def with_records(self, moved: Mapping[Record, Record]) -> "Plan":
        """Return the plan for a copy of its source: ``moved`` maps the source's records to those of the copy.

        Raises:
            ChangedError: the copy's records differ in name, size or CRC-32.
        """
        for old, new in moved.items():
            if (old.name, old.range.length, old.crc32) != (new.name, new.range.length, new.crc32):
                raise ChangedError(f"{old.file.name} was changed after its index was read. Run the same command again.")
        shards = [
            replace(
                shard,
                tensors=tuple(
                    (name, tensor.map_leaves(lambda leaf: replace(leaf, record=moved.get(leaf.record, leaf.record))))
                    for name, tensor in shard.tensors
                ),
            )
            for shard in self.shards
        ]
        return replace(self, shards=tuple(shards))

    def sources(self) -> list[FileRef]:
        """The files that tensors are read from, in the order of their first use."""
        leaves = (leaf for shard in self.shards for _, tensor in shard.tensors for leaf in tensor.leaves())
        return list(dict.fromkeys(leaf.record.file for leaf in leaves))

    def as_dict(self) -> dict[str, Any]:
        """Summarise the plan for JSON; `plan_json` stores a complete plan."""
        return {
            **self.names,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "bytes": self.size,
            "source_bytes": self.source_bytes,
            "shards": [
                {"file": s.filename, "bytes": s.size, "tensors": [name for name, _ in s.tensors]} for s in self.shards
            ],
            "mapping": [
                {"source": m.source, "dtype": m.info.dtype, "shape": m.info.shape, "targets": m.targets}
                for m in self.mapping
            ],
            "cast": self.cast,
            "notes": self.notes,
            "unproved": self.unproved,
            "skipped": [asdict(each) for each in self.skipped],
            "filled": self.filled,
            "config": self.config,
            "image_processor": self.image_processor,
            "fingerprint": self.fingerprint,
        }


def _side(size: Any) -> int:
    """Return the side of a square, which some configs write as [height, width]."""
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def with_int_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with the ids of its labels as ints, in whose order transformers writes them."""
    ids = config.get("id2label")
    if not isinstance(ids, Mapping) or not all(re.fullmatch(r"0|[1-9][0-9]{0,8}", str(key)) for key in ids):
        return {**config}
    return {**config, "id2label": {int(key): label for key, label in ids.items()}}


def label_config(labels: Sequence[str]) -> dict[str, Any]:
    """Return the entries of config.json that name a classifier's classes."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
