"""Makes plans: identifies the model, matches its tensors against the rules, and lays out the files."""

from collections.abc import Mapping, Sequence
from typing import Any

from streamconv.errors import MappingError, UsageError
from streamconv.families.base import ConversionSpec, Family, Model
from streamconv.families.expected import ExpectedTensor, constants, expand, without_fills
from streamconv.families.mapping import map_tensors
from streamconv.families.other_models import recognise
from streamconv.families.selection import Selection, Skipped
from streamconv.families.wrapped_names import unwrapped
from streamconv.formats.non_tensors import non_tensor_error
from streamconv.planning.heads import choose_heads, with_given_heads
from streamconv.planning.image_processor import OwnImageProcessor, choose_image_processor
from streamconv.planning.plan import MappedTensor, Plan
from streamconv.planning.reads import refuse_unstreamable
from streamconv.planning.repeats import repeats_note
from streamconv.planning.shards import DEFAULT_SHARD_BYTES, lay_out
from streamconv.planning.small_files import architecture_of, config_notes, label_problems, make_config, to_small_files
from streamconv.tensors.computed import cast
from streamconv.tensors.constants import filled
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import BY_TORCH_NAME, CastDtype, DtypeCode, TensorInfo


def make_plan(
    tensors: Mapping[str, Expression],
    where: str,
    labels: Sequence[str] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    selection: Selection,
    model: Model | None = None,
    dtype: CastDtype | None = None,
    num_heads: int | None = None,
    image_processor: OwnImageProcessor | None = None,
    filename: str = "",
    summaries: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide the whole output.

    Args:
        tensors: The selected tensors by their keys in the family's rules; a head's too (`Family.join_head`).
        where: The source's name for messages.
        labels: A classifier's labels, one per class; None gives transformers' LABEL_0 and so on.
        max_shard_bytes: The maximum size of one weight file.
        selection: The family, the tensors' names in the file, and the tensors that are skipped.
        model: The published model that the source was named as.
        dtype: The dtype to cast to; None keeps tensors as they are stored.
        num_heads: The number of attention heads, if it is not what the family assumes.
        image_processor: The image processor that the user gave, if one was given.
        filename: The name of the backbone's file, which distinguishes published models of equal dimensions.
        summaries: Summaries of the tensors whose values decide (`DecidingValues`), by key; None if none was read.

    Raises:
        MappingError: the tensors are not exactly those of a known model; lists every difference.
        UsageError: the number of labels is not the number of classes, the image processor does not suit the model, or
            ``num_heads`` is given for a family that does not have this aspect, or for a published model that has
            another number.
        SourceError: a small file would be too large to be read again.
    """
    family = selection.family
    read = _read_dimensions(tensors, selection, summaries)
    heads = choose_heads(read, selection, num_heads)
    if model is not None and read == model.dimensions != heads.dimensions:
        raise UsageError(f"{model.name} has another number of attention heads than {num_heads}. Omit --num-heads.")
    dimensions, candidates = _identify(heads.dimensions, where, family, model)
    spec = family.conversion_spec(dimensions)
    expected = expand(spec.rules, spec.dims, spec.counts)
    block_chunks = _block_chunks(selection, spec.counts)
    _refuse_other_tensors(selection, where)
    corrected = with_given_heads(selection, num_heads)
    problems = _problems(spec, corrected, block_chunks)
    names = selection.display_names
    # A converted model has every tensor of its class; only its authors' file may leave out what has no effect.
    rules = without_fills(spec.rules) if selection.is_converted else spec.rules
    code = None if dtype is None else BY_TORCH_NAME[dtype].code
    try:
        targets = map_tensors(rules, tensors, spec.dims, spec.counts, where, problems, names, code)
    except MappingError as error:
        raise _explained(error, tensors, expected, names, where) from error

    stored_dtype = next(iter(targets.values())).info.dtype
    written_dtype = code or stored_dtype
    fills = constants(spec.rules, spec.dims, spec.counts)
    config = make_config(spec, family, written_dtype, labels, corrected.config)
    written = _as_written(targets, fills, written_dtype, family)
    refuse_unstreamable(written)
    shards, index = lay_out(written, max_shard_bytes)
    known = model or _with_dimensions(candidates, filename)
    # Any file can have a published model's shapes, so only the published name makes it that model.
    is_published = known is not None and (model is not None or known.backbone.filename == filename)
    likely = candidates if known is None else [known]
    chosen = choose_image_processor(family, likely, selection, spec, image_processor, is_published=is_published)
    assumes_nothing = is_published or (selection.config and candidates)
    notes, unproved = ((), ()) if assumes_nothing else (spec.notes, spec.unproved)
    unproved = (*unproved, *selection.unproved)
    return Plan(
        family_name=family.name,
        model_name=known.name if known is not None else None,
        is_published=is_published,
        assumed_heads=None if is_published else heads.assumed,
        dimensions=dimensions,
        architecture=architecture_of(config, spec, family),
        mapping=tuple(
            MappedTensor(names.get(key, key), tensors[key].info, each.targets)
            for key, each in expected.items()
            if each.targets
        ),
        shards=shards,
        config=config,
        image_processor=chosen.config,
        image_processor_from=chosen.origin,
        small_files=to_small_files(config, chosen, has_own_labels=labels is not None),
        index=index,
        notes=(
            *([heads.note] if heads.note and not is_published else []),
            *notes,
            *config_notes(config, selection),
            *chosen.notes,
            *selection.small_file_notes,
            *unproved,
            *filter(None, [repeats_note(shards)]),
        ),
        unproved=(*([heads.unproved] if heads.unproved and not is_published else []), *unproved),
        # A converted model has nothing that the rules leave out: its sources are made from its targets.
        skipped=(*selection.skipped, *(() if selection.is_converted else _dropped(tensors, spec, selection.prefix))),
        filled={name: value for name, (value, _) in fills.items()},
        block_chunks=block_chunks or 0,
    )


def _read_dimensions(
    tensors: Mapping[str, Expression], selection: Selection, summaries: Mapping[str, Any] | None
) -> Any:
    """Read the dimensions from the tensors' shapes, the source's config.json, and the values that decide."""
    family = selection.family
    dimensions = family.read_dimensions({key: tensor.info for key, tensor in tensors.items()})
    dimensions = family.with_config(dimensions, selection.config)
    if family.deciding_values is None or summaries is None or selection.is_converted:
        return dimensions
    return family.deciding_values.with_summaries(dimensions, summaries)


def _identify(dimensions: Any, where: str, family: Family, model: Model | None) -> tuple[Any, Sequence[Model]]:
    """Return the dimensions and the published models that have them.

    If the user named ``model`` and the source fits no published model, return the dimensions of ``model``, so that all
    differences from it are listed.
    """
    candidates = [known for known in family.models if known.dimensions == dimensions]
    if model is None or model in candidates:
        return dimensions, candidates
    if candidates:
        raise MappingError(f"{where} is not {model.name}:", [f"its shapes are those of {candidates[0].name}"])
    return model.dimensions, [model]


def _block_chunks(selection: Selection, counts: Mapping[str, int]) -> int | None:
    """Return the number of lists that the file's blocks are in: 0 for one plain list, None if no number fits."""
    chunks = selection.family.block_chunks
    if chunks is None or selection.is_converted:
        return 0
    layers = counts[chunks.index]
    keys = selection.family.split_head(selection.names)[0]
    names = {key: unwrapped(name.removeprefix(selection.prefix)) for key, (name,) in keys.items()}
    if all(key == name for key, name in names.items()):
        return 0
    # A name that does not fit one number of lists mostly does not fit the next ones either, so it is compared first.
    # Comparing all names for each number would take time in proportion to blocks times tensors.
    wrong = next(iter(names))
    for count in range(1, layers + 1):
        if chunks.chunked_key(wrong, layers, count) == names[wrong]:
            others = (key for key, name in names.items() if chunks.chunked_key(key, layers, count) != name)
            if (found := next(others, None)) is None:
                return count
            wrong = found
    return None


def _refuse_other_tensors(selection: Selection, where: str) -> None:
    tensors = {name: each for name, each in selection.unread.items() if each.kind.is_tensor}
    if tensors:
        raise non_tensor_error(tensors, where)


def _problems(spec: ConversionSpec, selection: Selection, block_chunks: int | None) -> list[str]:
    """List problems other than those with the tensors' names, shapes and dtypes."""
    return [
        *spec.problems,
        *(f"{name} is a {kind}, which is not read" for name, kind in selection.unread.items()),
        *selection.family.config_problems(spec, selection.config),
        *label_problems(spec, selection.family, selection.config),
        *(["its blocks are in lists of unequal lengths, or in the wrong order"] if block_chunks is None else []),
    ]


def _explained(
    error: MappingError,
    tensors: Mapping[str, Expression],
    expected: Mapping[str, ExpectedTensor],
    names: Mapping[str, str],
    where: str,
) -> MappingError:
    """Return an error that names the model that the tensors belong to, if it is known; otherwise ``error``."""
    shapes = {names.get(key, key): tensor.info.shape for key, tensor in tensors.items()}
    found = ((key, expected.get(key)) for key in tensors)
    ranks = {names.get(key, key): len(each.shape or ()) for key, each in found if each is not None}
    return recognise(shapes, where, ranks=ranks) or error


def _as_written(
    targets: Mapping[str, Expression],
    fills: Mapping[str, tuple[float, tuple[int, ...]]],
    dtype: DtypeCode,
    family: Family,
) -> dict[str, Expression]:
    """Return all tensors of the output as ``dtype``, in the order in which transformers saves them."""
    written = {name: cast(tensor, dtype) for name, tensor in targets.items()}
    written |= {name: filled(value, TensorInfo(dtype, shape)) for name, (value, shape) in fills.items()}
    return dict(sorted(written.items(), key=lambda item: _natural_key(family.loaded_keys(item[0])[0])))


def _natural_key(name: str) -> list[tuple[int, int | str, int]]:
    """Sort the parts of a dotted name, numbers and trailing numbers as numbers, as transformers 5 does."""
    key: list[tuple[int, int | str, int]] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        number = part[len(text) :]
        key.append((1, text, int(number) if number else -1) if text else (0, int(number or 0), 0))
    return key


def _with_dimensions(candidates: Sequence[Model], filename: str) -> Model | None:
    """Return the published model of these dimensions. If there are several, only the file's name distinguishes them."""
    named = [model for model in candidates if model.backbone.filename == filename]
    return candidates[0] if len(candidates) == 1 else next(iter(named), None)


def _dropped(tensors: Mapping[str, Expression], spec: ConversionSpec, prefix: str) -> tuple[Skipped, ...]:
    """Return the tensors that rules drop, and the parts that they leave out of others, grouped by rule."""
    skipped = []
    for rule in spec.rules:
        sizes: dict[tuple[str, str], list[int]] = {}
        for keys, _ in rule.repetitions(spec.counts) if rule.drop_reason or rule.omits else ():
            found = [tensors[key] for key in keys if key in tensors]
            for reason, info in rule.left_out(found, spec.dims) if found else ():
                where = f"{prefix}{' and '.join(rule.sources)}{' (a part)' if rule.targets else ''}"
                sizes.setdefault((where, reason), []).append(info.nbytes)
        skipped += [Skipped(start, len(each), sum(each), reason) for (start, reason), each in sizes.items()]
    return tuple(skipped)
