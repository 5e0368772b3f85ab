"""Which of a checkpoint's tensors are the backbone: the whole file, or a part of a training checkpoint.

A backbone stands under a prefix ("", "teacher.backbone.", "state_dict.module."), and a prefix is taken off
whole keys that begin with it, never off their middle: `dino_head.norm.bias` is no backbone's `norm.bias`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import MappingError, UsageError
from streamconv.families.base import ExtraPrefix, Family
from streamconv.families.detection import find_converted, find_family
from streamconv.families.registry import all_families
from streamconv.formats.checkpoint import Checkpoint
from streamconv.tensors.expressions import SourceTensor

FLAT_PARAMETER = "_flat_param"  # torch.distributed.fsdp's name of many tensors in one


@dataclass(frozen=True)
class Skipped:
    """Tensors beside the backbone: what their names begin with, how many, their bytes, and why they stay behind."""

    start: str
    tensors: int
    nbytes: int
    reason: str

    def __str__(self) -> str:
        name = f"{self.start}*" if self.start.endswith(".") else self.start
        count = "1 tensor" if self.tensors == 1 else f"{self.tensors:,} tensors"
        return f"{name} ({count}, {self.nbytes:,} bytes): {self.reason}"


@dataclass(frozen=True)
class Selection:
    """What of a file is converted.

    ``names`` gives for each of a backbone's names, as its family's rules have them, the one in the file; of a model
    that was converted before, the three of its queries, keys and values. ``unread`` is the class of each of its values
    that is no tensor, by the rules' names. ``config`` is the config.json of a model that was converted before.
    """

    prefix: str
    names: Mapping[str, tuple[str, ...]]
    skipped: tuple[Skipped, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    is_converted: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def called(self) -> dict[str, str]:
        """``names``, for messages."""
        return {key: " + ".join(names) for key, names in self.names.items()}


def find_backbone(checkpoint: Checkpoint, where: str, prefix: str | None = None) -> Selection:
    """Find the backbone among a file's tensors, under ``prefix`` where there are several.

    Raises:
        MappingError: there is none, there are several, what stands beside it is not known, or one of its names
            stands there twice.
        UsageError: there is none under ``prefix``.
    """
    found = _candidates(checkpoint)
    if prefix is not None:
        prefix = _complete(prefix, found, where)
    elif len(found) > 1:
        raise MappingError(
            f"{where} holds several backbones. Choose one by --select PREFIX:",
            [f"{each or '(none)'} {sum(name.startswith(each) for name in checkpoint):,} tensors" for each in found],
        )
    if not found:
        _refuse_flat_parameters((*checkpoint, *checkpoint.others), where)
        _refuse_heads(checkpoint, where)
        if not checkpoint and checkpoint.others:
            held = [f"{name} is a {kind}" for name, kind in checkpoint.others.items()]
            raise MappingError(f"{where} holds objects, which are not read, and no tensor in a plain dict:", held)
        infos = {name: tensor.info for name, tensor in checkpoint.items()}
        converted = find_converted(infos)
        if converted is not None:
            return Selection("", converted[1], is_converted=True)
        find_family(infos, where)  # says what is missing
    chosen = next(iter(found)) if prefix is None else prefix
    return _divide(checkpoint, where, chosen, found[chosen], is_chosen=prefix is not None)


def _complete(prefix: str, found: Iterable[str], where: str) -> str:
    """The one that was found and is ``prefix``, with or without its last dot; or that ends in it."""
    if f"{prefix.rstrip('.')}." in found or prefix in found:
        return prefix and f"{prefix.rstrip('.')}."
    ending = [each for each in found if prefix and each.endswith(f".{prefix.rstrip('.')}.")]
    if len(ending) == 1:
        return ending[0]
    choices = " or ".join(f"--select {each.rstrip('.') or repr('')}" for each in ending or found)
    under = f"one backbone under {prefix}" if prefix else "a backbone without a prefix"
    raise UsageError(f"{where} does not have {under}. Say {choices}." if choices else f"{where} holds no backbone.")


def _candidates(tensors: Mapping[str, SourceTensor]) -> dict[str, Family]:
    """The prefixes under which most of a family's signature stands, in the file's order."""
    counts: Counter[tuple[str, str]] = Counter()
    families = {family.name: family for family in all_families()}
    ends = [(key, name) for name, family in families.items() for key in family.signature]
    for name in tensors:
        for key, family in ends:
            if name.endswith(key) and (len(name) == len(key) or name[-len(key) - 1] == "."):
                counts[name[: -len(key)], family] += 1
    return {
        prefix: families[family]
        for (prefix, family), count in counts.items()
        if 2 * count > len(families[family].signature)
    }


def _divide(checkpoint: Checkpoint, where: str, prefix: str, family: Family, is_chosen: bool) -> Selection:
    parents = ["", *(prefix[: i + 1] for i, letter in enumerate(prefix) if letter == ".")]
    names: dict[str, str] = {}
    skipped: dict[tuple[str, str], list[int]] = {}
    problems: list[str] = []
    for name, tensor in checkpoint.items():
        apart = _apart(name, parents, family) or _no_weight(name, tensor, prefix)
        if apart is None and name.startswith(prefix):
            flat = family.flat_name(name.removeprefix(prefix))
            if flat in names:
                problems.append(f"{names[flat]} and {name} are both {flat}")
            names[flat] = name
            continue
        start, known = apart or (_start(name, prefix), None)
        if known is not None and known.is_left_out:
            reason = known.reason
        elif is_chosen:
            reason = "not selected"
        else:
            problems.append(f"{name} {list(tensor.info.shape)}{': ' + known.reason if known is not None else ''}")
            continue
        skipped.setdefault((start, reason), []).append(tensor.info.nbytes)
    if problems:
        is_beside = any(" are both " not in problem for problem in problems)
        mend = f". To leave these out, say --select {prefix.rstrip('.') or repr('')}:" if is_beside else ":"
        raise MappingError(f"{where} holds more than a backbone{mend}", problems)
    return Selection(
        prefix,
        {key: (name,) for key, name in names.items()},
        tuple(Skipped(start, len(sizes), sum(sizes), reason) for (start, reason), sizes in skipped.items()),
        {
            family.flat_name(name.removeprefix(prefix)): kind
            for name, kind in checkpoint.others.items()
            if name.startswith(prefix)
        },
    )


def _apart(name: str, parents: Iterable[str], family: Family) -> tuple[str, ExtraPrefix] | None:
    """Where ``name`` begins with what is known to stand apart: below the backbone's prefix, or beside a part of it."""
    for parent in parents:
        for apart in family.apart:
            if name.startswith(parent + apart.start):
                return parent + apart.start, apart
    return None


def _no_weight(name: str, tensor: SourceTensor, prefix: str) -> tuple[str, ExtraPrefix] | None:
    """What training keeps beside a backbone: torch.optim's state by parameters' numbers, counters, random states."""
    if name.startswith(prefix) and prefix:
        return None
    state = re.match(r"(?:.*?\.)??state\.(?=\d+\.)", name)
    if state is not None:
        return state[0], ExtraPrefix(state[0], "an optimizer's state")
    is_weight = tensor.info.shape and tensor.info.dtype in ("F64", "F32", "F16", "BF16")
    return None if is_weight or name.startswith(prefix) else (name, ExtraPrefix(name, "a number of the training's"))


def _start(name: str, prefix: str) -> str:
    """What ``name`` has in common with ``prefix``, and one part more."""
    parts, own = name.split("."), prefix.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(parts, own, strict=False)) if a != b), 0)
    return ".".join(parts[: shared + 1]) + ("." if len(parts) > shared + 1 else "")


def _refuse_flat_parameters(names: Iterable[str], where: str) -> None:
    flat = [name for name in names if FLAT_PARAMETER in name]
    if flat:
        raise MappingError(
            f"{where} is one process's part of a model that FSDP cut up (LOCAL_STATE_DICT): its tensors lie in flat "
            "ones, and nothing says where. Use the teacher_checkpoint.pth that training writes at each evaluation, or "
            "save under FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT). It holds:",
            flat,
        )


def _refuse_heads(names: Iterable[str], where: str) -> None:
    for family in all_families():
        for apart in family.apart:
            found = [name for name in names if f".{apart.start}" in f".{name}"]
            if found and not apart.is_left_out:
                raise MappingError(f"{where} is {apart.reason}. It holds:", found)
