"""States what is assumed about weights that are left out. Verification cannot show it: both models lack them."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping

from streamconv.families.base import Family
from streamconv.families.detection import find_converted_prefixes, find_prefixes
from streamconv.families.layout import Layout
from streamconv.tensors.info import DTYPES, TensorInfo

MAX_LISTED = 4


def left_out(names: Iterable[str], whose: str) -> str:
    """Return the assumption about weights, given by the starts of their names; empty if there are none."""
    starts = [*dict.fromkeys(names)]
    if not starts:
        return ""
    more = f" and {len(starts) - MAX_LISTED:,} more" if len(starts) > MAX_LISTED else ""
    return f"{', '.join(starts[:MAX_LISTED])}{more}: left out, and assumed not to change the {whose}'s outputs"


def left_out_beside_head(
    chosen: Mapping[str, str], infos: Mapping[str, TensorInfo], layers: Iterable[Mapping[str, str]], family: Family
) -> str:
    """Return what is assumed about weights in the module of a chosen head, such as a norm before it.

    Backbones, other heads and the state of training do not matter.

    Args:
        chosen: The names of the head's tensors by their keys.
        infos: The tensors of the head's file, without those of the model's backbone.
        layers: The linear layers among them, like ``chosen``.
    """
    if not chosen:
        return ""
    parent = "".join(next(iter(chosen.values())).rpartition(".")[0].rpartition(".")[:2])
    backbones = {**find_prefixes(infos), **find_converted_prefixes(infos)}
    if not parent and "" in backbones:
        return ""

    def shape(layer: Mapping[str, str]) -> tuple[int, ...]:
        return max((infos[name].shape for name in layer.values()), key=len)

    def is_head(layer: Mapping[str, str]) -> bool:
        """Return whether a layer has the chosen one's inputs or classes, and cannot run before or after it."""
        ours, other = shape(chosen), shape(layer)
        if layer == chosen:
            return True
        if len(other) != 2 or other[0] == ours[1] or other[1] == ours[0]:
            return False
        return other[0] == ours[0] or other[1] == ours[1]

    known = {name for layer in layers if is_head(layer) for name in layer.values()}
    layout, starts = Layout(family, parent, is_converted=False), _outermost(filter(None, backbones))

    def is_in_backbone(name: str) -> bool:
        at = bisect_right(starts, name)  # only the last start that sorts before a name can be its prefix
        return at > 0 and name.startswith(starts[at - 1])

    return left_out(
        (
            layout.start(name)
            for name, info in infos.items()
            if name.startswith(parent) and name not in known and not is_in_backbone(name)
            if info.shape and DTYPES[info.dtype].is_weight and layout.extra(name, info) is None
        ),
        "head",
    )


def _outermost(prefixes: Iterable[str]) -> list[str]:
    """Return the prefixes that begin with no other one, sorted."""
    found: list[str] = []
    for each in sorted(prefixes):
        if not found or not each.startswith(found[-1]):
            found.append(each)
    return found
