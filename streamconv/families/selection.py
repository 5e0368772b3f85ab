"""Selects a checkpoint's backbone: the whole file, or a part of a training checkpoint.

The backbone's names start with a prefix ("", "teacher.backbone.", "state_dict.module."). The prefix is removed from the
start of whole keys only, never from their middle: `head.norm.bias` is not a backbone's `norm.bias`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from streamconv.errors import MappingError
from streamconv.families.aspects import ExtraPrefix
from streamconv.families.base import Family
from streamconv.families.classifier_heads import HeadsBeside
from streamconv.families.detection import choose_family, find_converted_prefixes, find_prefixes
from streamconv.families.layout import Layout
from streamconv.families.mapping import Origin, joined, origins_of
from streamconv.families.no_backbone import no_backbone_error, refuse_other_models
from streamconv.families.prefixes import complete_prefix, several_backbones, shown
from streamconv.families.wrapped_names import unwrapped
from streamconv.formats.checkpoint import Checkpoint
from streamconv.formats.non_tensors import NonTensor
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import DTYPES, TensorInfo

_ITSELF = Origin(())
_WEIGHT = TensorInfo("F32", (1,))  # stands for a tensor whose dtype and shape are not known


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

    ``names`` maps each key of the backbone, and of a head in the same file, as the family's rules spell it, to the
    file's name for it; in a model that was converted before, to all names that the key's tensor is restored from, as
    ``origins`` describes. ``head_names`` maps the keys of a head in a file of its own to that file's names. ``unread``
    are the values, by their names in the file, that would be parts of the model if they were plain tensors. ``config``
    is the config.json of a model that was converted before, and ``image_processor`` its preprocessor_config.json, None
    if it has none; ``image_processor_file`` has that file's bytes. ``config_beside`` is the config.json that was found
    beside a file in its authors' names; it may belong to another model. ``guessed_heads`` is the number of attention
    heads that an earlier conversion guessed for ``config``. ``unproved`` are assumptions that verification shares.
    ``small_file_notes`` are remarks on the files that were found.
    """

    family: Family
    prefix: str
    names: Mapping[str, tuple[str, ...]]
    skipped: tuple[Skipped, ...] = ()
    unread: Mapping[str, NonTensor] = field(default_factory=dict)
    is_converted: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    image_processor: Mapping[str, Any] | None = None
    image_processor_file: bytes = b""
    config_beside: Mapping[str, Any] = field(default_factory=dict)
    guessed_heads: int | None = None
    head_names: Mapping[str, str] = field(default_factory=dict)
    unproved: tuple[str, ...] = ()
    small_file_notes: tuple[str, ...] = ()
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def tensors(self, checkpoint: Mapping[str, Expression], where: str) -> dict[str, Expression]:
        """Return the tensors of the file by their keys in the rules.

        Raises:
            MappingError: the rules for a converted model have no inverse.
        """
        if not self.origins:
            return {key: checkpoint[name] for key, (name,) in self.names.items()}
        parts = {key: [checkpoint[name] for name in names] for key, names in self.names.items()}
        infos = {key: self.origins.get(key, _ITSELF).info([part.info for part in each]) for key, each in parts.items()}
        spec = self.family.conversion_spec(self.family.read_dimensions(infos))
        return joined(self.origins, parts, spec.dims, spec.counts, where)

    @property
    def is_concatenated(self) -> bool:
        """True if each key's tensor is that of its name, or the concatenation of its names' tensors along dim 0."""
        return all(origin.is_concatenated for origin in self.origins.values())

    @property
    def display_names(self) -> dict[str, str]:
        """The file's names by key, for messages."""
        return {key: " + ".join(names) for key, names in self.names.items()}


def find_backbone(
    checkpoint: Checkpoint, where: str, prefix: str | None = None, head_prefix: str | None = None
) -> Selection:
    """Find the backbone among a file's tensors, and a classifier's head beside it.

    Args:
        prefix: The prefix of the backbone, if the user chose one. Then other tensors are skipped, and so is a head.
        head_prefix: The prefix of a head in the same file, if the user chose one.

    Raises:
        MappingError: there is no backbone or there are several, other tensors are unknown, it fits several families
            equally well, or two names mean the same key.
        UsageError: there is no backbone under ``prefix``, or no head under ``head_prefix``.
    """
    original = find_prefixes(checkpoint)
    found = {**find_converted_prefixes(checkpoint), **original}
    if not found:
        raise no_backbone_error(checkpoint, where)
    if prefix is None and len(found) > 1:
        raise several_backbones(found, checkpoint, where)
    chosen = next(iter(found)) if prefix is None else complete_prefix(prefix, found, where)
    infos = {
        unwrapped(name.removeprefix(chosen)): tensor.info
        for name, tensor in checkpoint.items()
        if name.startswith(chosen)
    }
    is_converted = chosen not in original

    def keys_of(family: Family) -> Iterable[str]:
        return origins_of(family.converted_rules, infos) if is_converted else map(family.unchunked_key, infos)

    layout = Layout(choose_family(found[chosen], keys_of, where), chosen, is_converted)
    return _select(checkpoint, where, layout, is_chosen=prefix is not None, head_prefix=head_prefix)


def _select(
    checkpoint: Checkpoint, where: str, layout: Layout, *, is_chosen: bool, head_prefix: str | None
) -> Selection:
    """Split the file's tensors into the backbone, its head, and what is skipped.

    Raises:
        MappingError: lists the tensors that are none of these, and names that mean the same key.
        UsageError: there is no head under ``head_prefix``.
    """
    infos = {name: tensor.info for name, tensor in checkpoint.items()}
    spelled, others, doubled = _sort(infos, layout)
    inner = {key: infos[name] for key, name in spelled.items()}
    found = layout.origins(inner)
    strays = {key: spelled.pop(key) for key in layout.strays(inner, found)}
    origins = {key: origin for key, origin in found.items() if strays.keys().isdisjoint(origin.names)}
    names = {key: tuple(spelled[each] for each in origin.names) for key, origin in origins.items()}
    backbone = {key: origin.info([infos[name] for name in names[key]]) for key, origin in origins.items()}
    inside = {*spelled.values()}
    candidates = {name: info for name, info in infos.items() if name not in inside}
    heads = HeadsBeside(layout, candidates, backbone, where)
    head = heads.choose(head_prefix, is_automatic=not is_chosen)
    if is_chosen or (strays and not any(layout.missing(backbone))):
        others |= {name: (layout.start(name), None) for name in strays.values()}
    else:  # the plan lists them together with what is missing
        names |= {key: (name,) for key, name in strays.items() if name not in head.values()}
    rest = {name: each for name, each in others.items() if name not in head.values()}
    skipped, unknown = _skip(rest, infos, heads, is_chosen=is_chosen)
    unread, unknown_unread = _sort_unread(checkpoint.non_tensors, layout, is_chosen=is_chosen)
    unknown |= {name: f"is a {each}" for name, each in unknown_unread.items()}
    if unknown or any(name in rest for name in strays.values()):
        # Even if the user selected it, what changes the computation is not left out.
        refuse_other_models(checkpoint, where, layout.prefix, is_part=True)
    if unknown or doubled:
        also = f" and --head-select {shown(heads.prefix_of(head))}" if head else ""
        fix = f". To skip other tensors, use --select {shown(layout.prefix)}{also}:" if unknown else ":"
        problems = chain(  # formatted lazily: there may be thousands, and the error keeps the first of them
            (f"{name} {what}" for name, what in unknown.items()),
            (f"{one} and {other} are both {key}" for one, other, key in doubled),
        )
        raise MappingError(f"{where} holds more than a backbone{fix}", problems, len(unknown) + len(doubled))
    left_out = [name for name in strays.values() if name in rest and DTYPES[infos[name].dtype].is_weight]
    assumptions = (heads.assumption(head), heads.assumption_beside(head), heads.assumption_without(left_out))
    return Selection(
        layout.family,
        layout.prefix,
        layout.family.join_head(names, {key: (name,) for key, name in head.items()}),
        skipped,
        unread,
        layout.is_converted,
        unproved=tuple(filter(None, assumptions)),
        origins=origins if layout.is_converted else {},
    )


def _sort(
    infos: Mapping[str, TensorInfo], layout: Layout
) -> tuple[dict[str, str], dict[str, tuple[str, ExtraPrefix | None]], list[tuple[str, str, str]]]:
    """Sort a file's names.

    Returns:
        Those inside the prefix by their spelling in the rules; the others with their starts and, if they are known,
        what they are; and pairs of names that mean the same, each with their spelling.
    """
    spelled: dict[str, str] = {}
    others: dict[str, tuple[str, ExtraPrefix | None]] = {}
    doubled: list[tuple[str, str, str]] = []
    for name, info in infos.items():
        extra = layout.extra(name, info)
        if extra is not None or not name.startswith(layout.prefix):
            others[name] = extra or (layout.start(name), None)
            continue
        key = layout.spelling(name)
        if key in spelled:
            doubled.append((spelled[key], name, key))
        spelled[key] = name
    return spelled, others, doubled


def _sort_unread(
    values: Mapping[str, NonTensor], layout: Layout, *, is_chosen: bool
) -> tuple[dict[str, NonTensor], dict[str, NonTensor]]:
    """Return the values that would be part of the model if they were plain tensors, and other unknown tensors.

    Leaving out the first would change the model: it could lose a bias. An object that is not a tensor counts as part of
    the model only if it has the name of one of its tensors.
    """
    inside: dict[str, NonTensor] = {}
    unknown: dict[str, NonTensor] = {}
    for name, each in values.items():
        if layout.extra(name, _WEIGHT) is not None:
            continue
        spelling = layout.spelling(name) if name.startswith(layout.prefix) else ""
        is_in_module = layout.is_in_module(spelling)
        if (each.kind.is_tensor and is_in_module) or (layout.is_known(spelling) and (is_in_module or not is_chosen)):
            inside[name] = each
        elif each.kind.is_tensor and not is_chosen:
            unknown[name] = each
    return inside, unknown


def _skip(
    others: Mapping[str, tuple[str, ExtraPrefix | None]],
    infos: Mapping[str, TensorInfo],
    heads: HeadsBeside,
    *,
    is_chosen: bool,
) -> tuple[tuple[Skipped, ...], dict[str, str]]:
    """Return the tensors beside a backbone that are skipped, and those that are unknown, with a description."""
    skipped: dict[tuple[str, str], list[int]] = {}
    unknown: dict[str, str] = {}
    for name, (start, extra) in others.items():
        if is_chosen or (extra is not None and extra.is_skipped):
            reason = extra.reason if extra is not None and extra.is_skipped else "not selected"
            skipped.setdefault((start, reason), []).append(infos[name].nbytes)
        else:
            why = extra.reason if extra is not None else heads.problem(name)
            unknown[name] = f"{list(infos[name].shape)}{f': {why}' if why else ''}"
    parts = (Skipped(start, len(sizes), sum(sizes), reason) for (start, reason), sizes in skipped.items())
    return tuple(parts), unknown
