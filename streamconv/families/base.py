"""The types that describe a family's architecture. Features that only some families have are in `aspects`.

A family's rules define the tensors and their conversion. The rest is the model's configuration, derived from the
tensors' shapes, and the names under which models were published. Code outside the family's own module checks for an
aspect (`Family.classifier_head` and so on), never for a particular family.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from streamconv.display import printable
from streamconv.families.aspects import (
    AttentionHeads,
    BlockChunks,
    ClassifierHead,
    DecidingValues,
    ExtraPrefix,
    ImageProcessor,
)
from streamconv.families.expected import expand
from streamconv.families.rules import Rule
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import TensorInfo

T = TypeVar("T")


@dataclass(frozen=True)
class ConversionSpec:
    """The conversion of a model of certain dimensions.

    ``dims`` maps the rules' symbols to numbers, and ``counts`` is how many values each index takes: ``{"i": 12}`` if
    there are 12 blocks. ``config`` is config.json without dtype and labels. ``problems``: dimensions that the
    transformers config cannot express. ``notes``: assumptions that the tensors do not confirm; ``unproved``: those that
    verification shares, and that change what the model computes.
    """

    rules: tuple[Rule, ...]
    dims: Mapping[str, int]
    counts: Mapping[str, int]
    architecture: str
    config: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()


@dataclass(frozen=True)
class RemoteFile:
    """A file as its authors published it: its name in torch.hub's cache, and its URL."""

    filename: str
    url: str

    @property
    def sha256_start(self) -> str:
        """The first digits of its sha256, if its name ends in them: name-1a2b3c4d.pth. See torch.hub's check_hash.

        Eight digits exclude accidents, but not attacks: another file with the same digits can be made.
        """
        found = re.search(r"-([0-9a-f]{8,64})[.][^.]+$", self.filename)
        return found[1] if found else ""


@dataclass(frozen=True)
class Model:
    """A published model. ``dimensions`` is a frozen dataclass of the family, compared with those read from a file.

    ``licence`` is the Hub's name for the licence that the authors chose. If the Hub has none, it is their own name for
    it, and ``licence_link`` is the address of its text. ``image_processor`` is None if the family has none;
    ``image_processor_note`` states how it differs from the one that the authors published. ``block_chunks`` is the
    number of lists that the blocks of its file are in, 0 for one plain list.
    """

    name: str
    published_name: str
    dimensions: Any
    licence: str
    backbone: RemoteFile
    image_processor: Mapping[str, Any] | None = None
    head: RemoteFile | None = None
    block_chunks: int = 0
    licence_link: str = ""
    image_processor_note: str = ""


def _same_key(key: str) -> tuple[str, ...]:
    return (key,)


def _patch_size(config: Mapping[str, Any]) -> Any:
    return config["patch_size"]


def _same_dimensions(dimensions: Any, config: Mapping[str, Any]) -> Any:
    return dimensions


@dataclass(frozen=True)
class Family:
    """An architecture, and the models of it that were published.

    ``signature``: keys by which a checkpoint is recognised. ``read_dimensions`` reads dimensions from the shapes of a
    checkpoint's tensors, even if some are missing or have wrong shapes, and ``conversion_spec`` turns them into rules
    and configuration.

    ``free_config_keys``: keys of config.json that do not change what the model computes at inference, or only what a
    backbone's output selects from it. ``tensor_config_keys``: keys that always follow the tensors, because they only
    say which tensors there are. ``untensored_config_keys``: keys whose values tensors do not show.

    ``patch_size`` takes config.json and returns the height and width, in pixels, of the image area of a patch token.
    ``equal_architectures`` maps an architecture to others that have the same tensors. ``with_config`` returns the
    dimensions with those values that only a model's own config.json shows; ``reverted_with_config`` does so for a model
    that is reverted, but only with values that the authors' code can have.

    ``loaded_keys`` returns the names of a target in memory after transformers has loaded it: several if transformers
    cuts it along dim 0. save_pretrained sorts tensors by the first name, so it decides the order of shards. A state
    dict that torch.save wrote has these names. ``extra_prefixes``: names that training adds to those of the backbone.
    ``variants`` are dimensions of models that were not published, with rules that no published model has.

    For model cards: ``organisation`` is the authors' organisation on the Hub, and ``pipeline_tags`` maps architectures
    to the Hub's names of their tasks.

    The remaining fields are aspects, each None if the family does not have it.
    """

    name: str
    signature: frozenset[str]
    models: tuple[Model, ...]
    read_dimensions: Callable[[Mapping[str, TensorInfo]], Any]
    conversion_spec: Callable[[Any], ConversionSpec]
    organisation: str
    pipeline_tags: Mapping[str, str]
    free_config_keys: frozenset[str] = frozenset()
    tensor_config_keys: frozenset[str] = frozenset()
    untensored_config_keys: frozenset[str] = frozenset()
    patch_size: Callable[[Mapping[str, Any]], Any] = _patch_size
    equal_architectures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    with_config: Callable[[Any, Mapping[str, Any]], Any] = _same_dimensions
    reverted_with_config: Callable[[Any, Mapping[str, Any]], Any] = _same_dimensions
    loaded_keys: Callable[[str], tuple[str, ...]] = _same_key
    extra_prefixes: tuple[ExtraPrefix, ...] = ()
    variants: tuple[Any, ...] = ()
    classifier_head: ClassifierHead | None = None
    image_processor: ImageProcessor | None = None
    block_chunks: BlockChunks | None = None
    attention_heads: AttentionHeads | None = None
    deciding_values: DecidingValues | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of all published models and of the variants, which together include every rule of the family."""
        known = (*(model.dimensions for model in self.models), *self.variants)
        return tuple(dict.fromkeys(rule for dimensions in known for rule in self.conversion_spec(dimensions).rules))

    @property
    def converted_rules(self) -> tuple[Rule, ...]:
        """The `rules`, and the same with the names of targets in memory, except for targets that are cut there."""
        loaded = ((rule, [self.loaded_keys(target) for target in rule.targets]) for rule in self.rules)
        return (
            *self.rules,
            *(
                replace(rule, targets=tuple(key for (key,) in keys))
                for rule, keys in loaded
                if all(len(each) == 1 for each in keys) and rule.targets != tuple(key for (key,) in keys)
            ),
        )

    def title_of(self, model: str | None, shaped_like: str | None) -> str:
        """Return a title for a checkpoint of a published ``model``, or of another one, which may have its shapes."""
        if model is not None:
            return model
        return f"a model shaped like {shaped_like}" if shaped_like else f"a {self.name} model of custom size"

    def unchunked_key(self, key: str) -> str:
        """Return the rules' spelling of a key in a file."""
        return self.block_chunks.unchunked_key(key) if self.block_chunks else key

    def sources(self, dimensions: Any, block_chunks: int = 0) -> dict[str, TensorInfo]:
        """Return every tensor of a float32 checkpoint with these dimensions; `split_head` separates the head's.

        Dropped tensors that may have any shape are not included; those that can be restored have their own dtype.
        """
        spec = self.conversion_spec(dimensions)
        fixed = self.fixed_values(dimensions)
        expected = expand(spec.rules, spec.dims, spec.counts)
        infos = {
            key: fixed[key].info if key in fixed else TensorInfo("F32", each.shape or ())
            for key, each in expected.items()
            if key in fixed or each.shape is not None
        }
        if not block_chunks or self.block_chunks is None:
            return infos
        blocks, chunked_key = spec.counts[self.block_chunks.index], self.block_chunks.chunked_key
        return {chunked_key(key, blocks, block_chunks): info for key, info in infos.items()}

    def fixed_values(self, dimensions: Any) -> dict[str, Expression]:
        """Return the source tensors that the authors' code gives fixed values, by key; they are not converted."""
        spec = self.conversion_spec(dimensions)
        expected = expand([rule for rule in spec.rules if rule.restored is not None], spec.dims, spec.counts)
        return {key: each.rule.restored for key, each in expected.items() if each.rule.restored is not None}

    def config_problems(self, spec: ConversionSpec, config: Mapping[str, Any]) -> list[str]:
        """List the entries of a model's config.json that describe a computation other than ``spec``."""
        unchecked = self.free_config_keys | self.tensor_config_keys
        return [
            f"its config.json sets {key} to {printable(repr(config[key]))}, but "
            f"{f'{self.name} models have' if key in self.untensored_config_keys else 'the tensors show'} "
            f"{printable(repr(value))}"
            for key, value in spec.config.items()
            if key not in unchecked and config.get(key, value) not in (value, [value, value])
        ]

    def split_head(self, tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
        """Return the tensors of the backbone's file and those of the head's, by their keys in the files."""
        if self.classifier_head is None:
            return dict(tensors), {}
        prefix = self.classifier_head.prefix
        backbone = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
        head = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        return backbone, head

    def join_head(self, backbone: Mapping[str, T], head: Mapping[str, T]) -> dict[str, T]:
        """Undo `split_head`."""
        prefix = self.classifier_head.prefix if self.classifier_head else ""
        return {**backbone, **{prefix + key: tensor for key, tensor in head.items()}}
