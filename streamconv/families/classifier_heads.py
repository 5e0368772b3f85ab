"""Finds a classifier's head: a linear layer in a backbone's file, or one of those in a larger file of heads.

Names alone do not make a head: its tensors must have the shapes that the family's rules give it beside the backbone.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import islice

from streamconv.errors import MappingError, UsageError
from streamconv.families.aspects import ClassifierHead
from streamconv.families.base import Family
from streamconv.families.layout import Layout
from streamconv.families.left_out import left_out, left_out_beside_head
from streamconv.families.prefixes import complete_prefix, matching_prefixes, shown
from streamconv.families.wrapped_names import prefix_before, untrained_start, unwrapped
from streamconv.tensors.info import TensorInfo

MAX_EXPLAINED = 4  # layers that a message explains
Layers = Mapping[str, Mapping[str, str]]
"""Layers by their prefixes: their names in the file by the keys of a head (`ClassifierHead.keys`)."""


def find_layers(names: Iterable[str], head: ClassifierHead) -> Layers:
    """Return the layers that have all keys of a head, whatever their shapes."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        bare = unwrapped(name)
        for key in head.keys:
            prefix = prefix_before(name, bare, key)
            if prefix is not None and not untrained_start(name):
                found[prefix][key] = name
    return {prefix: layer for prefix, layer in found.items() if layer.keys() == head.keys}


def fitting_layers(
    layers: Layers, infos: Mapping[str, TensorInfo], family: Family, backbone: Mapping[str, TensorInfo]
) -> Layers:
    """Return the layers with the shapes that a head of the ``backbone`` has, for any number of classes."""
    head = family.classifier_head
    assert head is not None
    expected = _shapes(family, head, backbone)
    fitting = {}
    for prefix, layer in layers.items():
        shapes = {key: infos[name].shape for key, name in layer.items()}
        classes = {
            size
            for key, wanted in expected.items()
            for size, symbol in zip(shapes[key], wanted, strict=False)
            if symbol is None
        }
        if len(classes) == 1 and all(
            shapes[key] == tuple(next(iter(classes)) if size is None else size for size in wanted)
            for key, wanted in expected.items()
        ):
            fitting[prefix] = layer
    return fitting


def _shapes(
    family: Family, head: ClassifierHead, backbone: Mapping[str, TensorInfo]
) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes of a head's tensors; None stands for the number of classes."""
    unknown = {head.prefix + key: TensorInfo("F32", ()) for key in head.keys}
    spec = family.conversion_spec(family.read_dimensions({**backbone, **unknown}))
    return {
        source.removeprefix(head.prefix): tuple(
            None if symbol == head.classes else int(symbol) if symbol.isdigit() else spec.dims[symbol]
            for symbol in shape or ()
        )
        for rule in spec.rules
        for source, shape in zip(rule.sources, rule.shapes, strict=False)
        if source.startswith(head.prefix)
    }


def choose_head(given: str, layers: Layers, fitting: Layers, where: str) -> Mapping[str, str]:
    """Return the layer that the user means: one of those that fit, or else any, whose problems are reported later.

    Raises:
        UsageError: there is none, or there are several.
    """
    if not layers:
        raise UsageError(f"{where} holds no head, so --head-select {given} finds none. Give its file with --head.")
    is_misfit = matching_prefixes(given, layers) and not matching_prefixes(given, fitting)
    return layers[complete_prefix(given, layers if is_misfit else fitting or layers, where, "--head-select", "head")]


def several_heads(layers: Layers, infos: Mapping[str, TensorInfo], where: str) -> MappingError:
    """Return the error for a file with several heads, or with one among other tensors."""
    what = "several heads" if len(layers) > 1 else "more than a head"
    return MappingError(
        f"{where} holds {what}. Choose one with --head-select PREFIX:",
        (f"{shown(prefix)} {described(layer, infos)}" for prefix, layer in layers.items()),
    )


def described(layer: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> str:
    """Return the shapes of a layer's tensors, the largest first."""
    shapes = sorted((infos[name].shape for name in layer.values()), key=len, reverse=True)
    return " and ".join(str(list(shape)) for shape in shapes)


class HeadsBeside:
    """The layers in a backbone's file that may be its head.

    ``infos`` are those of the tensors that are not the backbone's, by the file's names, and ``backbone`` those of the
    backbone's, by its keys in the rules.
    """

    def __init__(self, layout: Layout, infos: Mapping[str, TensorInfo], backbone: Mapping[str, TensorInfo], where: str):
        self._layout, self._infos, self._backbone, self._where = layout, infos, backbone, where
        self._head = layout.family.classifier_head
        self._layers = find_layers(infos, self._head) if self._head is not None else {}
        self._fitting = fitting_layers(self._layers, infos, layout.family, backbone) if self._layers else {}

    def choose(self, given: str | None, *, is_automatic: bool) -> Mapping[str, str]:
        """Return the names of the head's tensors by the keys of a head, empty if there is none.

        Args:
            given: The prefix that the user chose.
            is_automatic: Without ``given``, take the layer that has a head's name and shapes.

        Raises:
            UsageError: there is no head under ``given``.
            MappingError: several layers have a head's name and shapes.
        """
        if given is not None:
            if self._head is None:
                raise UsageError(f"A {self._layout.family.name} model takes no head. Omit --head-select.")
            return choose_head(given, self._layers, self._fitting, self._where)
        named = {prefix: layer for prefix, layer in self._fitting.items() if self._start(prefix) is not None}
        if not is_automatic or not named:
            return {}
        if len(named) > 1:
            raise several_heads(named, self._infos, self._where)
        return next(iter(named.values()))

    def prefix_of(self, chosen: Mapping[str, str]) -> str:
        return next((prefix for prefix, layer in self._layers.items() if layer == chosen), "")

    def _start(self, prefix: str) -> str | None:
        """Return which of a head's names a layer has, inside the backbone's prefix or beside a part of it."""
        bare = unwrapped(prefix)
        for start in self._head.starts if self._head is not None else ():
            before = prefix_before(prefix, bare, start)
            if before is not None and not unwrapped(before.removeprefix(self._layout.parent_of(before))):
                return start
        return None

    def problem(self, name: str) -> str:
        """Return why a tensor that has a head's name cannot be a head's; empty if that is not known."""
        return self._problems.get(name, "")

    @cached_property
    def _problems(self) -> Mapping[str, str]:
        family = self._layout.family
        found: dict[str, str] = {}
        named = (prefix for prefix in self._layers if self._start(prefix) is not None and prefix not in self._fitting)
        for layer in map(self._layers.__getitem__, islice(named, MAX_EXPLAINED)):
            joined = family.join_head(self._backbone, {key: self._infos[name] for key, name in layer.items()})
            without, with_head = (
                family.conversion_spec(family.read_dimensions(each)).problems for each in (self._backbone, joined)
            )
            reasons = "; ".join(problem for problem in with_head if problem not in without)
            found |= dict.fromkeys(layer.values(), reasons)
        return found

    def assumption(self, chosen: Mapping[str, str]) -> str:
        """Return what is assumed about the head that was chosen; empty if it is named as its authors name it."""
        if self._head is None or not chosen or not self._head.reads:
            return ""
        start = self._start(self.prefix_of(chosen))
        if start == self._head.prefix or (self._layout.is_converted and start in self._layout.head_targets):
            return ""
        return f"{' and '.join(sorted(chosen.values()))} are assumed to be a head that reads {self._head.reads}"

    def assumption_without(self, names: Iterable[str]) -> str:
        """Return what is assumed about weights inside the backbone's prefix that are left out, other than a head's."""
        return left_out((self._layout.start(name) for name in names if not self._is_in_head(name)), "backbone")

    def assumption_beside(self, chosen: Mapping[str, str]) -> str:
        """Return what is assumed about weights beside the head that was chosen."""
        return left_out_beside_head(chosen, self._infos, self._layers.values(), self._layout.family)

    def _is_in_head(self, name: str) -> bool:
        starts = tuple(self._head.starts) if self._head is not None else ()
        return unwrapped(name.removeprefix(self._layout.prefix)).startswith(starts)


def head_in_file(
    infos: Mapping[str, TensorInfo], given: str | None, where: str, family: Family, backbone: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """Return the names of the head's tensors in a file of its own, or in a larger one, by the keys of a head.

    Args:
        given: The prefix of the head's names; None if the file holds nothing else.

    Raises:
        MappingError: the file does not hold a head, or holds other tensors, too.
        UsageError: there is no head under ``given``.
    """
    head = family.classifier_head
    assert head is not None
    layers = find_layers(infos, head)
    fitting = fitting_layers(layers, infos, family, backbone)
    if given is not None:
        return dict(choose_head(given, layers, fitting, where))
    if len(layers) == 1 and len(infos) == len(head.keys):
        return dict(next(iter(layers.values())))
    if fitting:
        raise several_heads(fitting, infos, where)
    shapes = {
        key: ", ".join(head.classes if size is None else str(size) for size in shape)
        for key, shape in sorted(_shapes(family, head, backbone).items())
    }
    raise MappingError(
        f"{where} is not a classifier's head, which holds {' and '.join(f'{k} [{v}]' for k, v in shapes.items())} and "
        f"nothing else. Save them with torch.save({{{', '.join(f'{key!r}: …' for key in shapes)}}}, FILE). It holds:",
        (f"{name} {list(info.shape)}" for name, info in infos.items()),
    )
