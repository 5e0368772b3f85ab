"""The layout of a backbone's names in a file: the prefix before them, and how the keys of the rules are spelled."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from streamconv.families.aspects import ExtraPrefix
from streamconv.families.base import Family
from streamconv.families.expected import expand
from streamconv.families.mapping import Origin, origins_of
from streamconv.families.other_contents import OPTIMIZER_STATE
from streamconv.families.patterns import Patterns
from streamconv.families.rules import Rule
from streamconv.families.wrapped_names import untrained_start, unwrapped
from streamconv.tensors.info import DTYPES, TensorInfo

_UNTRAINED = "a module that PEFT replaces with a trained copy"


@dataclass(frozen=True)
class Layout:
    """A family's names in a file. ``is_converted``: they are those of targets, not of sources."""

    family: Family
    prefix: str
    is_converted: bool

    @cached_property
    def _parents(self) -> tuple[str, ...]:
        return ("", *(self.prefix[: i + 1] for i, letter in enumerate(self.prefix) if letter == "."))

    def parent_of(self, name: str) -> str:
        """Return the whole parts that both the prefix and ``name`` begin with: "", "teacher.", "teacher.backbone."."""
        # Bisection, because a prefix may have hundreds of parts, and many names begin with most of them.
        return self._parents[bisect_left(self._parents, True, 1, key=lambda parent: not name.startswith(parent)) - 1]

    def spelling(self, name: str) -> str:
        """Return the rules' spelling of a name under the prefix."""
        key = unwrapped(name.removeprefix(self.prefix))
        return key if self.is_converted else self.family.unchunked_key(key)

    def origins(self, infos: Mapping[str, TensorInfo]) -> dict[str, Origin]:
        """Return the sources that tensors of these spellings are, or were made from."""
        if self.is_converted:
            return origins_of(self.family.converted_rules, infos)
        return {key: Origin((key,)) for key in infos}

    @cached_property
    def head_targets(self) -> frozenset[str]:
        """The starts of a head's names in a converted model."""
        head = self.family.classifier_head
        return frozenset(
            target.rpartition(".")[0] + "."
            for rule in self.family.rules
            if head is not None and rule.is_under(head.prefix)
            for target in rule.targets
        )

    def is_known(self, spelling: str) -> bool:
        """Return whether a model of the family may have a tensor of this spelling, whatever its number of blocks."""
        return spelling in self._patterns

    @cached_property
    def _patterns(self) -> Patterns[None]:
        return Patterns((pattern, None) for pattern in {each for rule in self._rules for each in self._spellings(rule)})

    @property
    def _rules(self) -> tuple[Rule, ...]:
        return self.family.converted_rules if self.is_converted else self.family.rules

    def _spellings(self, rule: Rule) -> tuple[str, ...]:
        return rule.targets if self.is_converted else rule.sources

    def strays(self, infos: Mapping[str, TensorInfo], origins: Mapping[str, Origin]) -> list[str]:
        """Return the spellings of names that are inside the prefix, but not inside any module of the backbone.

        ``origins`` are those of ``infos``.
        """
        spec = self.family.conversion_spec(
            self.family.read_dimensions({key: infos[each.names[0]] for key, each in origins.items()})
        )
        known = self._modules | self._modules_of(spec.rules)
        return [spelling for spelling in infos if spelling.partition(".")[0] not in known]

    def is_in_module(self, spelling: str) -> bool:
        """Return whether a spelling is inside a module that published models have."""
        return spelling.partition(".")[0] in self._modules

    @cached_property
    def _modules(self) -> frozenset[str]:
        return self._modules_of(self._rules)

    def _modules_of(self, rules: Iterable[Rule]) -> frozenset[str]:
        head = self.family.classifier_head
        return frozenset(
            spelling.partition(".")[0]
            for rule in rules
            if head is None or not rule.is_under(head.prefix)
            for spelling in self._spellings(rule)
        )

    def extra(self, name: str, info: TensorInfo) -> tuple[str, ExtraPrefix] | None:
        """Recognise what is not part of the model, and where its names start."""
        parts, parent = f".{name}", self.parent_of(name)
        found = [(parts.find(f".{extra.start}"), extra) for extra in self.family.extra_prefixes]
        found = [(at, extra) for at, extra in found if 0 <= at <= len(parent)]
        if found:  # the outermost one
            at, extra = min(found, key=lambda each: each[0])
            return name[:at] + extra.start, extra
        if start := untrained_start(name):
            return start, ExtraPrefix(start, _UNTRAINED)
        return self._training_state(name, info)

    def _training_state(self, name: str, info: TensorInfo) -> tuple[str, ExtraPrefix] | None:
        """Recognise what training saves in addition: torch.optim's numbered state, counters, random states."""
        if name.startswith(self.prefix) and self.prefix:
            return None
        if state := OPTIMIZER_STATE.search(name):
            start = name[: state.end()]
            return start, ExtraPrefix(start, "optimizer state")
        head, own = self.family.classifier_head, name.removeprefix(self.parent_of(name))
        is_head = head is not None and any(own == start + key for start in head.starts for key in head.keys)
        # Scalars in a head are weights, so that the head is reported as wrong, not skipped.
        is_weight = is_head or (info.shape and DTYPES[info.dtype].is_weight)
        return None if is_weight or name.startswith(self.prefix) else (name, ExtraPrefix(name, "training state"))

    def start(self, name: str) -> str:
        """Return the leading parts that ``name`` shares with the prefix, and the next part."""
        end = name.find(".", len(self.parent_of(name)))
        return name[: end + 1] if end >= 0 else name

    def missing(self, backbone: Mapping[str, TensorInfo]) -> Iterator[str]:
        """Yield the keys that a backbone lacks, whatever the shapes of the others."""
        spec = self.family.conversion_spec(self.family.read_dimensions(backbone))
        for key, expected in expand(spec.rules, spec.dims, spec.counts).items():
            if key not in backbone and not expected.rule.drop_reason:
                yield key
