"""Selects a checkpoint's backbone: the whole file, or a part of a training checkpoint.

The backbone's names start with a prefix ("", "teacher.backbone.", "state_dict.module."). The prefix is removed from the
start of whole keys only, never from their middle: `head.norm.bias` is not a backbone's `norm.bias`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import MappingError, UsageError
from streamconv.families.base import ExtraPrefix, Family
from streamconv.families.detection import choose_family, find_converted, find_prefixes, unknown_model
from streamconv.families.near_names import near_names
from streamconv.families.registry import all_families
from streamconv.formats.checkpoint import Checkpoint
from streamconv.tensors.expressions import SourceTensor

MAX_CHOICES = 3  # prefixes that a message about another prefix suggests
FLAT_PARAMETER = "_flat_param"  # torch.distributed.fsdp's name for many tensors in one


@dataclass(frozen=True)
class Skipped:
    """Tensors that are not converted: the start of their names, their number and total size, and the reason."""

    start: str
    tensors: int
    nbytes: int
    reason: str

    @property
    def pattern(self) -> str:
        """The start of the names, with a * for the rest of them."""
        return f"{self.start}*" if self.start.endswith(".") else self.start

    def __str__(self) -> str:
        count = "1 tensor" if self.tensors == 1 else f"{self.tensors:,} tensors"
        return f"{self.pattern} ({count}, {self.nbytes:,} bytes): {self.reason}"


@dataclass(frozen=True)
class Selection:
    """The part of a file that is converted, and the family that it belongs to.

    ``names`` maps each key of the backbone, as its family's rules spell it, to the file's name for it; in a model that
    was converted before, to all names that make up the key's tensor. ``unread`` maps the keys of values that are not
    tensors to their classes. ``config`` is the config.json of a model that was converted before, and
    ``image_processor`` its preprocessor_config.json, None if it has none. ``config_beside`` is the config.json that was
    found beside a file in its authors' names; it may belong to another model.
    """

    family: Family
    prefix: str
    names: Mapping[str, tuple[str, ...]]
    skipped: tuple[Skipped, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    is_converted: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    image_processor: Mapping[str, Any] | None = None
    config_beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def display_names(self) -> dict[str, str]:
        """The file's names by key, for messages."""
        return {key: " + ".join(names) for key, names in self.names.items()}


def find_backbone(checkpoint: Checkpoint, where: str, prefix: str | None = None) -> Selection:
    """Find the backbone among a file's tensors; ``prefix`` chooses one of several.

    Raises:
        MappingError: there is no backbone or there are several, other tensors are unknown, it fits several families
            equally well, or two names mean the same key.
        UsageError: there is no backbone under ``prefix``.
    """
    found = find_prefixes(checkpoint)
    if prefix is not None:
        prefix = _complete(prefix, found, where)
    elif len(found) > 1:
        raise MappingError(
            f"{where} holds several backbones. Choose one with --select PREFIX:",
            [f"{each or '(none)'} {sum(name.startswith(each) for name in checkpoint):,} tensors" for each in found],
        )
    if not found:
        return _find_converted_backbone(checkpoint, where)
    chosen = next(iter(found)) if prefix is None else prefix

    def keys_of(family: Family) -> Iterable[str]:
        names = (name.removeprefix(chosen) for name in checkpoint if name.startswith(chosen))
        return map(family.unchunked_key, names)

    family = choose_family(found[chosen], keys_of, where)
    return _split_backbone(checkpoint, where, chosen, family, is_chosen=prefix is not None)


def _find_converted_backbone(checkpoint: Checkpoint, where: str) -> Selection:
    """Select a whole file of a model that was converted before; if it is not one, explain what it is."""
    _refuse_flat_parameters((*checkpoint, *checkpoint.non_tensors), where)
    _refuse_heads(checkpoint, where)
    if not checkpoint and checkpoint.non_tensors:
        held = [f"{name} is a {kind}" for name, kind in checkpoint.non_tensors.items()]
        raise MappingError(f"{where} holds objects, which are not read, and no tensor in a plain dict:", held)
    converted = find_converted({name: tensor.info for name, tensor in checkpoint.items()}, where)
    if converted is None:
        raise unknown_model(checkpoint.keys(), where)
    family, names = converted
    return Selection(family, "", names, is_converted=True)


def _complete(prefix: str, found: Iterable[str], where: str) -> str:
    """Return the prefix found that equals ``prefix``, with or without its last dot, or the only one that ends in it."""
    if f"{prefix.rstrip('.')}." in found or prefix in found:
        return prefix and f"{prefix.rstrip('.')}."
    ending = [each for each in found if prefix and each.endswith(f".{prefix.rstrip('.')}.")]
    if len(ending) == 1:
        return ending[0]
    near = ending or near_names(prefix.rstrip("."), found) or [*found]
    if near == [""]:
        raise UsageError(f"{where} does not have a backbone under {prefix}, but one without a prefix. Omit --select.")
    choices = " or ".join(f"--select {each.rstrip('.') or repr('')}" for each in near[:MAX_CHOICES])
    under = f"one backbone under {prefix}" if prefix else "a backbone without a prefix"
    raise UsageError(f"{where} does not have {under}. Use {choices}." if choices else f"{where} holds no backbone.")


def _split_backbone(checkpoint: Checkpoint, where: str, prefix: str, family: Family, is_chosen: bool) -> Selection:
    """Split the file's tensors into the backbone and what is skipped.

    Raises:
        MappingError: lists the tensors that are neither, and names that mean the same key.
    """
    parents = ["", *(prefix[: i + 1] for i, letter in enumerate(prefix) if letter == ".")]
    names: dict[str, str] = {}
    skipped: dict[tuple[str, str], list[int]] = {}
    unknown: list[str] = []
    doubled: list[str] = []
    for name, tensor in checkpoint.items():
        extra = _find_extra(name, parents, family) or _training_state(name, tensor, prefix)
        if extra is None and name.startswith(prefix):
            key = family.unchunked_key(name.removeprefix(prefix))
            if key in names:
                doubled.append(f"{names[key]} and {name} are both {key}")
            names[key] = name
            continue
        start, known = extra or (_start(name, prefix), None)
        if known is not None and known.is_skipped:
            reason = known.reason
        elif is_chosen:
            reason = "not selected"
        else:
            unknown.append(f"{name} {list(tensor.info.shape)}{': ' + known.reason if known is not None else ''}")
            continue
        skipped.setdefault((start, reason), []).append(tensor.info.nbytes)
    if unknown or doubled:
        fix = f". To skip other tensors, use --select {prefix.rstrip('.') or repr('')}:" if unknown else ":"
        raise MappingError(f"{where} holds more than a backbone{fix}", unknown + doubled)
    return Selection(
        family,
        prefix,
        {key: (name,) for key, name in names.items()},
        tuple(Skipped(start, len(sizes), sum(sizes), reason) for (start, reason), sizes in skipped.items()),
        {
            family.unchunked_key(name.removeprefix(prefix)): kind
            for name, kind in checkpoint.non_tensors.items()
            if name.startswith(prefix)
        },
    )


def _find_extra(name: str, parents: Iterable[str], family: Family) -> tuple[str, ExtraPrefix] | None:
    """Find the family's extra prefix that ``name`` starts with, inside the backbone's prefix or beside a part of it."""
    for parent in parents:
        for extra in family.extra_prefixes:
            if name.startswith(parent + extra.start):
                return parent + extra.start, extra
    return None


def _training_state(name: str, tensor: SourceTensor, prefix: str) -> tuple[str, ExtraPrefix] | None:
    """Recognise what training saves in addition: torch.optim's numbered state, counters, random states."""
    if name.startswith(prefix) and prefix:
        return None
    state = re.match(r"(?:.*?\.)??state\.(?=\d+\.)", name)
    if state is not None:
        return state[0], ExtraPrefix(state[0], "optimizer state")
    is_weight = tensor.info.shape and tensor.info.dtype in ("F64", "F32", "F16", "BF16")
    return None if is_weight or name.startswith(prefix) else (name, ExtraPrefix(name, "training state"))


def _start(name: str, prefix: str) -> str:
    """Return the leading parts that ``name`` shares with ``prefix``, and the next part."""
    parts, own = name.split("."), prefix.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(parts, own, strict=False)) if a != b), 0)
    return ".".join(parts[: shared + 1]) + ("." if len(parts) > shared + 1 else "")


def _refuse_flat_parameters(names: Iterable[str], where: str) -> None:
    flat = [name for name in names if FLAT_PARAMETER in name]
    if flat:
        raise MappingError(
            f"{where} is one process's part of a model that FSDP sharded (LOCAL_STATE_DICT): its tensors are in flat "
            "parameters, which do not show where each one is. Use the teacher_checkpoint.pth that training writes at "
            "each evaluation, or save under FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT). It holds:",
            flat,
        )


def _refuse_heads(names: Collection[str], where: str) -> None:
    for family in all_families():
        for extra in family.extra_prefixes:
            found = [name for name in names if f".{extra.start}" in f".{name}"]
            if found and not extra.is_skipped:
                raise MappingError(f"{where} is {extra.reason}. It holds:", found)
        if family.classifier_head is not None and {*names} == family.classifier_head.keys:
            raise MappingError(f"{where} is a classifier's head. Give it with --head, and its backbone as SOURCE.", ())
