"""TODO families.detection"""

import re
from collections.abc import Iterable, Mapping

from streamconv.errors import MappingError
from streamconv.families.base import Family
from streamconv.families.registry import all_families
from streamconv.families.rules import Rule
from streamconv.tensors.info import TensorInfo


def find_family(infos: Mapping[str, TensorInfo], where: str) -> Family:
    """The family of whose signature the most keys are here, so that `mapping.apply` can list the rest.

    Raises:
        MappingError: no family has more than half of its signature here.
    """
    nearest = min(all_families(), key=lambda family: len(family.signature - infos.keys()))
    missing = sorted(nearest.signature - infos.keys())
    if 2 * len(missing) >= len(nearest.signature):
        known = ", ".join(family.name for family in all_families())
        held = ", ".join(list(infos)[:3]) + ", …" * (len(infos) > 3) or "no tensor"
        raise MappingError(
            f"{where} is no checkpoint of a model that streamconv knows ({known}). It holds {held}; "
            f"for {nearest.name} it lacks:",
            missing,
        )
    return nearest


def find_converted(infos: Mapping[str, TensorInfo]) -> tuple[Family, dict[str, tuple[str, ...]]] | None:
    """The family of whose targets these are, and of what targets each of its sources is made up (`source_names_of`).

    None where no family has more than half of its signature here.
    """
    for family in all_families():
        sources = source_names_of(family.rules, infos)
        if 2 * len(family.signature & sources.keys() - infos.keys()) > len(family.signature):
            return family, sources
    return None


# A dot-free part of a name that is one of the numbers from 0 on.
_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,5})(?![^.])")


def source_names_of(rules: Iterable[Rule], targets: Mapping[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    """The sources that ``targets`` were made from, each with those that make it up; what fits no rule is its own.

    Parts of one source have one dtype and shape.
    """
    makers = {target: rule for rule in rules for target in rule.targets if rule.value is None}
    sources: dict[str, tuple[str, ...]] = {}
    for name in targets:
        number = _NUMBER.search(name)
        rule = makers.get(_NUMBER.sub("{i}", name, count=1)) if "{i}" not in name else None
        i = number and number[0]
        parts = tuple(target.format(i=i) for target in rule.targets) if rule is not None else ()
        if rule is not None and targets.keys() >= {*parts} and len({targets[part] for part in parts}) == 1:
            sources[rule.source.format(i=i)] = parts
        else:
            sources[name] = (name,)
    return sources
