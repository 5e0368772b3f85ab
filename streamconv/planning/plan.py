"""The plan: every byte that will be written, decided from the indexes alone. Pure data, no I/O."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import PurePath
from typing import Any

from streamconv.errors import MappingError, SourceError, UsageError
from streamconv.families.base import ConversionSpec, Family, Model, config_problems
from streamconv.families.detection import find_family
from streamconv.families.rules import constants, expand, map_tensors
from streamconv.families.selection import Selection, Skipped
from streamconv.planning.shards import PIECE_BYTES, Shard, lay_out, to_json
from streamconv.tensors.expressions import AnyTensor, SourceTensor, filled
from streamconv.tensors.info import TensorInfo

_TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CASTS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what a model may be cast to


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """One source tensor and what becomes of it: renamed, or cut along dim 0 into several."""

    source: str
    tensor: AnyTensor
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """``files`` are the small files by name; ``model`` is None where no published model has these sizes, or several;
    ``geometry`` is the family's own description of them. ``notes`` say what no tensor does, and ``skipped`` what
    of the source is not converted. ``filled`` are the values of targets that the source has not, and
    ``block_chunks`` is the family's number of the lists that its blocks are in."""

    family: Family
    model: Model | None
    geometry: Any
    architecture: str
    moves: tuple[MappedTensor, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    image_processor: Mapping[str, Any]
    files: Mapping[str, bytes]
    index: bytes | None
    notes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    filled: Mapping[str, float] = field(default_factory=dict)
    block_chunks: int = 0

    @property
    def size(self) -> int:
        """Of everything that will be written but the manifest, in bytes."""
        return sum(s.size for s in self.shards) + sum(map(len, self.files.values())) + len(self.index or b"")

    @property
    def weights(self) -> int:
        """Bytes of tensors, headers apart."""
        return sum(tensor.target.nbytes for shard in self.shards for _, tensor in shard.tensors)

    @property
    def parameters(self) -> int:
        return sum(t.info.nbytes // t.info.itemsize for shard in self.shards for _, t in shard.tensors)

    @property
    def cast_to(self) -> str:
        """The dtype that tensors are cast to, as `SourceTensor` has it; empty where all stay as they are stored."""
        return next((tensor.cast_to for shard in self.shards for _, tensor in shard.tensors if tensor.cast_to), "")

    @property
    def cast(self) -> dict[str, str] | None:
        """torch's names of the dtypes that the tensors are cast "from" and "to"; None where they stay as stored."""
        if not self.cast_to:
            return None
        stored = {tensor.info.dtype for shard in self.shards for _, tensor in shard.tensors if tensor.cast_to}
        return {
            "from": " and ".join(sorted(_TORCH_DTYPES[dtype] for dtype in stored)),
            "to": _TORCH_DTYPES[self.cast_to],
        }

    @property
    def title(self) -> str:
        return self.family.title_of(self.model)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model.name if self.model else None,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "bytes": self.size,
            "shards": [
                {"file": s.filename, "bytes": s.size, "tensors": [name for name, _ in s.tensors]} for s in self.shards
            ],
            "mapping": [
                {"source": m.source, "dtype": m.tensor.info.dtype, "shape": m.tensor.info.shape, "targets": m.targets}
                for m in self.moves
            ],
            "cast": self.cast,
            "notes": self.notes,
            "skipped": [asdict(each) for each in self.skipped],
            "filled": self.filled,
            "config": self.config,
            "fingerprint": self.fingerprint,
        }

    @property
    def labels_digest(self) -> str:
        """sha256 of a classifier's labels."""
        return sha256(json.dumps(self.config.get("id2label")).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """sha256 over every output byte's origin, but for labels: headers, each tensor's place, the config."""
        config = {key: value for key, value in self.config.items() if key not in ("id2label", "label2id")}
        digest = sha256(to_json(config) + self.files["preprocessor_config.json"])
        for shard in self.shards:
            digest.update(shard.filename.encode() + shard.header)
            for _, tensor in shard.tensors:
                digest.update(f"{tensor.record.name}\0{tensor.offset}\0{tensor.strides}\0".encode())
        return digest.hexdigest()


def make_plan(
    tensors: Mapping[str, AnyTensor],
    where: str,
    labels: Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    model: Model | None = None,
    dtype: str | None = None,
    num_heads: int | None = None,
    selection: Selection | None = None,
) -> Plan:
    """Decide the whole output.

    Args:
        tensors: A checkpoint's; a linear head's stand under `families.HEAD_PREFIX`.
        where: The source's name for messages.
        labels: A classifier's, one a class; None gives transformers' LABEL_0 and so on.
        max_shard_size: Bytes, or words as huggingface_hub reads them: "500MB", "5GB".
        model: The published model that the checkpoint is said to be.
        dtype: What the tensors are cast to, one of `CASTS`; None leaves them as they are stored.
        num_heads: Of attention, where it is not what the family's other models have.
        selection: What the file calls the tensors, and what else it holds.

    Raises:
        MappingError: the tensors are not exactly those of a known model; lists every difference.
        UsageError: the shard size, the number of labels or the dtype is no good.
    """
    if dtype is not None and dtype not in CASTS:
        raise UsageError(f"{dtype!r} is no dtype to cast to. Choose one of {', '.join(CASTS)}.")
    selection = selection or Selection("", {key: (key,) for key in tensors})
    family, geometry, alike = _identify(tensors, where, model, num_heads)
    layout = family.layout(geometry)
    expected = expand(layout.rules, layout.dims, layout.count)
    called = selection.called
    unread = [(selection.prefix + key, kind) for key, kind in selection.unread.items() if key in expected]
    problems = [*layout.problems, *(f"{name} is a {kind}, which is not read" for name, kind in unread)]
    problems += config_problems(layout, selection.config)
    chunks = _block_chunks(family, selection, layout.count)
    if chunks is None:
        problems.append("its blocks are in chunks, and not in those of any block_chunks of DinoVisionTransformer")
    targets = map_tensors(
        layout.rules, tensors, layout.dims, layout.count, where, problems, called, is_cast=dtype is not None
    )
    _refuse_unstreamable(targets)

    stored = _dtype_of(targets, where)
    written = stored if dtype is None else CASTS[dtype]
    targets = {name: _as_written(tensor, written) for name, tensor in targets.items()}
    fills = constants(layout.rules, layout.dims, layout.count)
    targets |= {name: filled(value, TensorInfo(written, shape)) for name, (value, shape) in fills.items()}
    config = {"architectures": [layout.architecture], "dtype": _TORCH_DTYPES[written], **layout.config}
    classes = layout.dims.get("K", 0)
    if classes:
        config |= _label_config(labels, classes)

    ordered = sorted(targets.items(), key=lambda item: _natural_key(family.in_memory_name(item[0])))
    shards, index = lay_out(dict(ordered), max_shard_size)
    image_processor = alike[0].image_processor if alike else family.image_processor
    return Plan(
        family=family,
        model=model or _published(alike, where),
        geometry=geometry,
        architecture=layout.architecture,
        moves=tuple(
            MappedTensor(called.get(key, key), tensors[key], tuple(target.format(i=i) for target in rule.targets))
            for key, (rule, _, i) in expected.items()
        ),
        shards=shards,
        config=config,
        image_processor=image_processor,
        files={"config.json": to_json(config), "preprocessor_config.json": to_json(image_processor)},
        index=index,
        notes=_notes(layout, image_processor, is_published=bool(alike) and geometry.heads is None, selection=selection),
        skipped=selection.skipped,
        filled={name: value for name, (value, _) in fills.items()},
        block_chunks=chunks or 0,
    )


def _notes(
    layout: ConversionSpec, image_processor: Mapping[str, Any], *, is_published: bool, selection: Selection
) -> tuple[str, ...]:
    """What no tensor says, and is written nevertheless."""
    notes = [] if is_published else [*layout.notes]
    trained, cropped = layout.config["image_size"], image_processor["crop_size"]["height"]
    if not is_published and trained != cropped:
        notes.append(
            f"the image processor cuts out {cropped} x {cropped} pixels, as DINOv2's published ones do; "
            f"the model's own size is {trained}"
        )
    if selection.is_converted:
        notes.append("config.json and preprocessor_config.json are written anew")
    return tuple(notes)


def _identify(
    tensors: Mapping[str, AnyTensor], where: str, model: Model | None, num_heads: int | None
) -> tuple[Family, Any, Sequence[Model]]:
    """The family, the sizes, and the published models that have them; or ``model``'s, which it is said to be."""
    infos = {name: tensor.info for name, tensor in tensors.items()}
    family = find_family(infos, where)
    geometry = _with_heads(family.geometry(infos), num_heads)
    alike = [known for known in family.models if known.geometry == geometry]
    if model is None or model in alike:
        return family, geometry, alike
    if alike:
        raise MappingError(f"{where} is not {model.name}:", [f"its shapes are those of {alike[0].name}"])
    return family, model.geometry, [model]  # so that what is listed is measured against the model asked for


def _dtype_of(targets: Mapping[str, SourceTensor], where: str) -> str:
    """The first one's. Of others than these it would be no model's."""
    others = {tensor.info.dtype for tensor in targets.values()} - _TORCH_DTYPES.keys()
    if others:
        held = ", ".join(sorted(others))
        raise MappingError(f"{where} cannot become a model:", [f"its tensors are {held}, which is no model's dtype"])
    return next(iter(targets.values())).info.dtype


def _as_written(tensor: SourceTensor, dtype: str) -> SourceTensor:
    return tensor if tensor.info.dtype == dtype else replace(tensor, cast_to=dtype)


def _with_heads(geometry: Any, num_heads: int | None) -> Any:
    """``geometry`` with a number of heads that is said; as it is, where that is the family's own."""
    if num_heads is None:
        return geometry
    if num_heads < 1:
        raise UsageError(f"A model cannot have {num_heads} heads. Give --num-heads as it was trained.")
    said = replace(geometry, heads=num_heads)
    return geometry if said.num_heads == geometry.num_heads else said


def _block_chunks(family: Family, selection: Selection, layers: int) -> int | None:
    """How many chunks make the names that the file has; 0 where its blocks are in none, None where no number does."""
    names = {key: name.removeprefix(selection.prefix) for key, name in selection.called.items()}
    if selection.is_converted or all(key == name for key, name in names.items()):
        return 0
    for count in range(1, layers + 1):
        if all(family.chunked_name(key, layers, count) == name for key, name in names.items()):
            return count
    return None


def _published(alike: Sequence[Model], where: str) -> Model | None:
    """The one of the published models of these sizes. Where there are several, only the file's name tells."""
    named = [model for model in alike if model.backbone.filename == PurePath(where.split(" with ")[0]).name]
    return alike[0] if len(alike) == 1 else next(iter(named), None)


def _label_config(labels: Sequence[str] | None, classes: int) -> dict[str, Any]:
    names = list(labels) if labels is not None else [f"LABEL_{i}" for i in range(classes)]
    if len(names) != classes:
        raise UsageError(f"There are {len(names)} labels for {classes} classes. Give one label a class, in order.")
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _refuse_unstreamable(targets: Mapping[str, SourceTensor]) -> None:
    problems = []
    for name, tensor in targets.items():
        if not tensor.is_contiguous:
            try:
                next(tensor.split(PIECE_BYTES))
            except SourceError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise MappingError("Some tensors are laid out so that they cannot be streamed:", problems)


def _natural_key(name: str) -> list[tuple[int, int | str, int]]:
    """Sorts the parts of a dotted name, numbers and trailing numbers as numbers, as transformers 5 does."""
    key: list[tuple[int, int | str, int]] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        number = part[len(text) :]
        key.append((1, text, int(number) if number else -1) if text else (0, int(number or 0), 0))
    return key
