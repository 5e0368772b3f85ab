"""The tensors of a converted folder in the layout of the model's authors, made by the inverse rules."""

from collections.abc import Mapping
from typing import Any

from streamconv.errors import MappingError
from streamconv.families.base import ConversionSpec, Family, Model
from streamconv.families.detection import find_converted
from streamconv.families.mapping import invert
from streamconv.families.registry import all_families
from streamconv.formats.checkpoint import Checkpoint
from streamconv.tensors.constants import filled
from streamconv.tensors.evaluation import read_bytes
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import DTYPES

MAX_FILLING_BYTES = 1 << 20  # a LayerScale or a mask token is a few kB


def without_fillings(checkpoint: Checkpoint, constants: Mapping[str, float]) -> Mapping[str, Expression]:
    """Return the tensors without those that the conversion filled in, unless some of these were changed since.

    Tensors without elements are omitted, too: transformers writes them for parts that a model does not have.
    """
    found = {name: tensor for name, tensor in checkpoint.items() if tensor.info.nbytes}
    constants = {name: value for name, value in constants.items() if name in found or name not in checkpoint}
    if not constants.keys() <= found.keys():
        return found
    for name, value in constants.items():
        info = checkpoint[name].info
        if not DTYPES[info.dtype].is_weight or info.nbytes > MAX_FILLING_BYTES:
            return found
        try:
            data = read_bytes(filled(value, info))
        except OverflowError:  # outside the range of the dtype, so the manifest was altered
            return found
        if read_bytes(checkpoint[name], checkpoint.reader) != data:
            return found
    return {name: tensor for name, tensor in found.items() if name not in constants}


def restore_originals(
    checkpoint: Mapping[str, Expression], where: str, config: Mapping[str, Any], recorded: str | None
) -> tuple[Family, Model | None, ConversionSpec, dict[str, Expression]]:
    """Return the family, the published model, its rules, and the original's tensors by key, in the original's order.

    ``recorded`` is the published model that the folder's manifest names. Its file may have tensors that a converted
    model does not show.

    Raises:
        MappingError: the tensors are not those of a converted model, or the conversion has no inverse.
    """
    infos = {name: tensor.info for name, tensor in checkpoint.items()}
    found = find_converted(infos, where)
    if found is None:
        known = ", ".join(each.name for each in all_families())
        held = [*list(infos)[:3], *["…"] * (len(infos) > 3)]
        raise MappingError(f"{where} does not hold a model that streamconv can convert to ({known}). It holds:", held)
    family, origins = found
    shapes = {key: origin.info([infos[name] for name in origin.names]) for key, origin in origins.items()}
    dimensions = family.reverted_with_config(family.read_dimensions(shapes), config)
    heads = family.attention_heads
    if heads is not None and (number := heads.number_in(config)) is not None:
        dimensions = heads.with_number(dimensions, number)
    spec = family.conversion_spec(dimensions)
    named = next((known for known in family.models if known.name == recorded), None)
    if named is not None and _are_converted_alike(family.conversion_spec(named.dimensions), spec):
        dimensions, spec = named.dimensions, family.conversion_spec(named.dimensions)
    problems = family.config_problems(spec, config)
    tensors = invert(spec.rules, checkpoint, spec.dims, spec.counts, where, problems)
    model = next((known for known in family.models if known.dimensions == dimensions), None)
    return family, model, spec, tensors


def _are_converted_alike(one: ConversionSpec, other: ConversionSpec) -> bool:
    return (one.config, one.dims, one.counts) == (other.config, other.dims, other.counts)
