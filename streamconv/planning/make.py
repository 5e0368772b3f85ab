"""Makes plans: identifies the model, matches its tensors against the rules, and lays out the files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from streamconv.errors import MappingError, SourceError, UsageError
from streamconv.families.base import ConversionSpec, Family, Model, config_problems
from streamconv.families.detection import find_family
from streamconv.families.rules import constants, expand, map_tensors
from streamconv.families.selection import Selection
from streamconv.planning.plan import CONFIG_NAME, MappedTensor, Plan, label_config
from streamconv.planning.shards import DEFAULT_SHARD_BYTES, PIECE_BYTES, lay_out, to_json
from streamconv.tensors.expressions import AnyTensor, SourceTensor, filled
from streamconv.tensors.info import BY_TORCH_NAME, DTYPES, CastDtype, TensorInfo


def make_plan(
    tensors: Mapping[str, AnyTensor],
    where: str,
    labels: Sequence[str] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    model: Model | None = None,
    dtype: CastDtype | None = None,
    num_heads: int | None = None,
    selection: Selection | None = None,
    filename: str = "",
) -> Plan:
    """Decide the whole output.

    Args:
        tensors: A checkpoint's; a linear head's stand under `families.HEAD_PREFIX`.
        where: The source's name for messages.
        labels: A classifier's, one a class; None gives transformers' LABEL_0 and so on.
        max_shard_bytes: The largest size of one file of weights.
        model: The published model that the checkpoint is said to be.
        dtype: What the tensors are cast to; None leaves them as they are stored.
        num_heads: Of attention, where it is not what the family's other models have.
        selection: What the file calls the tensors, and what else it holds.
        filename: The backbone's file, whose name tells published models of equal dimensions apart.

    Raises:
        MappingError: the tensors are not exactly those of a known model; lists every difference.
        UsageError: the number of labels is not that of the classes, or the number of heads is impossible.
    """
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
    written = stored if dtype is None else BY_TORCH_NAME[dtype].code
    targets = {name: _as_written(tensor, written) for name, tensor in targets.items()}
    fills = constants(layout.rules, layout.dims, layout.count)
    targets |= {name: filled(value, TensorInfo(written, shape)) for name, (value, shape) in fills.items()}
    config = {"architectures": [layout.architecture], "dtype": DTYPES[written].torch, **layout.config}
    classes = layout.dims.get("K", 0)
    if classes:
        config |= _label_config(labels, classes)

    ordered = sorted(targets.items(), key=lambda item: _natural_key(family.in_memory_name(item[0])))
    shards, index = lay_out(dict(ordered), max_shard_bytes)
    image_processor = alike[0].image_processor if alike else family.image_processor
    published = model or _published(alike, filename)
    return Plan(
        family_name=family.name,
        model_name=published.name if published is not None else None,
        dimensions=geometry,
        architecture=layout.architecture,
        mapping=tuple(
            MappedTensor(called.get(key, key), tensors[key].info, tuple(target.format(i=i) for target in rule.targets))
            for key, (rule, _, i) in expected.items()
        ),
        shards=shards,
        config=config,
        image_processor=image_processor,
        small_files={CONFIG_NAME: to_json(config), "preprocessor_config.json": to_json(image_processor)},
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
    others = {tensor.info.dtype for tensor in targets.values() if not DTYPES[tensor.info.dtype].is_weight}
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


def _published(alike: Sequence[Model], filename: str) -> Model | None:
    """The published model of these dimensions. If there are several, only the file's name tells them apart."""
    named = [model for model in alike if model.backbone.filename == filename]
    return alike[0] if len(alike) == 1 else next(iter(named), None)


def _label_config(labels: Sequence[str] | None, classes: int) -> dict[str, Any]:
    names = list(labels) if labels is not None else [f"LABEL_{i}" for i in range(classes)]
    if len(names) != classes:
        raise UsageError(f"There are {len(names)} labels for {classes} classes. Give one label a class, in order.")
    return label_config(names)


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
