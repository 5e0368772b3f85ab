"""Explains what a file without a backbone is, and which file to give instead."""

from collections.abc import Collection

from streamconv.errors import MappingError
from streamconv.families import other_models
from streamconv.families.base import Family
from streamconv.families.detection import unknown_model
from streamconv.families.other_contents import OPTIMIZER_STATE, other_contents_error
from streamconv.families.registry import all_families
from streamconv.formats.checkpoint import Checkpoint
from streamconv.formats.non_tensors import Kind


def no_backbone_error(checkpoint: Checkpoint, where: str) -> MappingError:
    """Return the error for a file without a backbone; if the file holds heads or another model, raise it at once."""
    _refuse_heads(checkpoint, where)
    refuse_other_models(checkpoint, where)
    return other_contents_error(checkpoint, where) or unknown_model(checkpoint.keys(), where)


def refuse_other_models(checkpoint: Checkpoint, where: str, prefix: str = "", *, is_part: bool = False) -> None:
    """Name what is under ``prefix``, if it is known and cannot be converted; see `other_models.recognise`."""
    shapes = {name: tensor.info.shape for name, tensor in checkpoint.items() if name.startswith(prefix)}
    others = [
        name
        for name, each in checkpoint.non_tensors.items()
        if name.startswith(prefix) and each.kind is not Kind.VALUE  # settings have any names
    ]
    if (error := other_models.recognise(shapes, where, others, is_part=is_part)) is not None:
        raise error


def _refuse_heads(names: Collection[str], where: str) -> None:
    for family in all_families():
        for extra in family.extra_prefixes:
            found = [name for name in names if f".{extra.start}" in f".{name}"]
            if found and not extra.is_skipped:
                raise MappingError(f"{where} is {extra.reason}. It holds:", found)
        if family.classifier_head is not None and {*names} == family.classifier_head.keys:
            raise MappingError(f"{where} is a classifier's head. Give it with --head, and its backbone as SOURCE.", ())
        reasons = dict.fromkeys(_reason_to_skip(name, family) for name in names)
        if reasons and None not in reasons:
            held = " and ".join(filter(None, reasons))
            raise MappingError(f"{where} holds no backbone, but {held}. Give the file of the backbone.", ())


def _reason_to_skip(name: str, family: Family) -> str | None:
    """Return what a name belongs to if it is never part of a backbone; None otherwise."""
    if OPTIMIZER_STATE.search(name):
        return "optimizer state"
    return next((extra.reason for extra in family.extra_prefixes if f".{extra.start}" in f".{name}"), None)
