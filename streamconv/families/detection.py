"""Detects the family of a checkpoint, by one rule for bare state dicts, prefixed ones and converted models.

The family with the most complete signature fits best, and more than half of the signature must be there. Among equals,
the one whose rules know the most of the checkpoint's keys fits best. If there is still a tie, the checkpoint is
refused: the order in which families are listed never decides.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice, product

from streamconv.display import printable
from streamconv.errors import MappingError
from streamconv.families.base import Family
from streamconv.families.mapping import Origin, origins_of
from streamconv.families.patterns import Patterns, substitute_indexes
from streamconv.families.registry import all_families
from streamconv.families.rules import Rule
from streamconv.families.wrapped_names import prefix_before, unwrapped
from streamconv.tensors.info import TensorInfo


def find_prefixes(names: Iterable[str]) -> dict[str, list[Family]]:
    """Return the prefixes under which ``names`` are those of a model, in their order, each with its `_best_fits`."""
    return _find_prefixes(
        names,
        [
            (spelling, key, family.name)
            for family in all_families()
            for key in family.signature
            for spelling in {key, family.block_chunks.chunked_key(key, 1, 1) if family.block_chunks else key}
        ],
    )


def find_converted_prefixes(names: Iterable[str]) -> dict[str, list[Family]]:
    """Return the same for the names of converted models.

    The prefix of a classifier's backbone is one of them: its head is found later.
    """
    targets = [
        (target, key, family)
        for family in all_families()
        for key, target in _signature_targets(family)
        if target != key
    ]
    loaded = [(each, target, key, family) for target, key, family in targets for each in family.loaded_keys(target)]
    # In memory, some names have a part before them that others do not have, so it is not a prefix of all.
    starts = {each.removesuffix(target) for each, target, _, _ in loaded if each != target and each.endswith(target)}
    spellings = {(target, key, family.name) for target, key, family in targets}
    spellings |= {(each, key, family.name) for each, target, key, family in loaded if each.endswith(target)}
    return _find_prefixes(names, sorted(spellings), starts)


def _signature_targets(family: Family) -> Iterator[tuple[str, str]]:
    """Yield each key of the signature with its targets, without the prefix that some architectures have before them."""
    rules = Patterns((source, rule) for rule in family.rules for source in rule.sources)
    for key in family.signature:
        firsts = ((rule.targets[0], values) for rule, values in rules.find(key) if rule.targets)
        targets = {substitute_indexes(target, values) for target, values in firsts}
        for target in targets:
            if not any(target.endswith(f".{other}") for other in targets):
                yield key, target


def _find_prefixes(
    names: Iterable[str], spellings: Iterable[tuple[str, str, str]], starts: Collection[str] = ()
) -> dict[str, list[Family]]:
    """Find the prefixes before the spellings of keys, each given with its key and the name of its family.

    If some spellings have one of ``starts`` before others, it may belong to a prefix or not: more keys fit one of them.
    """
    by_last_part: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for each in spellings:
        by_last_part[each[0].rpartition(".")[2]].append(each)
    # The keys of the families' signatures under each prefix. A hostile file may have thousands of prefixes, so they are
    # found in one pass, and prefixes with the same keys share a set.
    found: dict[str, frozenset[tuple[str, str]]] = {}
    with_key = cache(lambda keys, key: keys | {key})
    for name in names:
        bare = unwrapped(name)
        for spelling, key, family_name in by_last_part.get(bare.rpartition(".")[2], ()):
            prefix = prefix_before(name, bare, spelling)
            if prefix is not None:
                found[prefix] = with_key(found.get(prefix, frozenset()), (family_name, key))

    for prefix, start in product([*found], starts):
        if prefix in found and (longer := prefix + start) in found:
            del found[prefix if len(found[prefix]) < len(found[longer]) else longer]

    @cache
    def fitting(keys: frozenset[tuple[str, str]]) -> list[Family]:
        return _best_fits([(family, [key for name, key in keys if name == family.name]) for family in all_families()])

    fits = {prefix: fitting(keys) for prefix, keys in found.items()}
    return {prefix: families for prefix, families in fits.items() if families}


def find_converted(infos: Mapping[str, TensorInfo], where: str) -> tuple[Family, dict[str, Origin]] | None:
    """Return the family whose targets these are, and how each of its sources is made from them (`origins_of`).

    Returns:
        None if these are the targets of no family.

    Raises:
        MappingError: several families fit equally well.
    """
    sources = {family.name: origins_of(family.converted_rules, infos) for family in all_families()}
    families = _best_fits([(family, sources[family.name].keys() - infos.keys()) for family in all_families()])
    if not families:
        return None
    family = choose_family(families, lambda family: sources[family.name], where)
    return family, sources[family.name]


def choose_family(families: Sequence[Family], keys_of: Callable[[Family], Iterable[str]], where: str) -> Family:
    """Return the one of ``families``, whose signatures are equally complete, that knows the most keys.

    ``keys_of`` returns the checkpoint's keys in a family's spelling; it is called if there are several families.

    Raises:
        MappingError: several know equally many.
    """
    if len(families) > 1:
        known = [_count_known(family.rules, keys_of(family)) for family in families]
        families = [family for family, count in zip(families, known, strict=True) if count == max(known)]
    if len(families) > 1:
        names = " and ".join(sorted(family.name for family in families))
        raise MappingError(f"{where} fits several families of models equally well: {names}.", ())
    return families[0]


def unknown_model(names: Collection[str], where: str) -> MappingError:
    """Return the error for a checkpoint that fits no family; it lists what is missing for the nearest one."""
    if not names:
        return MappingError(f"{where} holds no tensor. Give the file of the model's weights.", ())
    nearest = min(all_families(), key=lambda family: (-_completeness(family, names), family.name))
    known = ", ".join(family.name for family in all_families())
    held = ", ".join(map(printable, islice(names, 3))) + ", …" * (len(names) > 3)
    return MappingError(
        f"{where} is not a checkpoint of a model that streamconv knows ({known}). It holds {held}; "
        f"for {nearest.name} it lacks:",
        sorted(nearest.signature - {*names}),
    )


def _best_fits(found: Iterable[tuple[Family, Collection[str]]]) -> list[Family]:
    """Return the families whose signatures are the most complete, if more than half of them is among the keys found."""
    shares = [(family, _completeness(family, keys)) for family, keys in found]
    most = max((share for _, share in shares), default=0.0)
    return [family for family, share in shares if share == most > 0.5]


def _completeness(family: Family, keys: Iterable[str]) -> float:
    """Return the share of a family's signature that is among ``keys``.

    Equal shares are equal floats, because a quotient of two integers is rounded correctly.
    """
    return len(family.signature.intersection(keys)) / len(family.signature)


def _count_known(rules: Iterable[Rule], keys: Iterable[str]) -> int:
    """Count the keys that match a rule as a whole."""
    sources = Patterns((source, None) for source in {source for rule in rules for source in rule.sources})
    return sum(key in sources for key in keys)
