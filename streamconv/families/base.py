"""What streamconv knows of each family of models: one module a family, found by listing the package.

A family module has a ``FAMILY``. Its rules say which tensors there are and what becomes of them;
the rest is the model's configuration from its shapes, and the names it was published under.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.families.rules import Rule, expand
from streamconv.tensors.info import TensorInfo

# A linear head's keys, `weight` and `bias`, stand in the source under this prefix.
HEAD_PREFIX = "linear_head."


@dataclass(frozen=True)
class ConversionSpec:
    """What a model of one geometry looks like on both sides.

    ``count`` is how many values a rule's ``{i}`` takes; ``config`` is config.json but for dtype
    and labels; ``dims`` gives the rules' symbols their numbers; ``problems`` say what of the
    geometry transformers' configuration has no way to say; ``notes`` what of it no tensor says.
    """

    rules: tuple[Rule, ...]
    dims: Mapping[str, int]
    count: int
    architecture: str
    config: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RemoteFile:
    """A file as its authors published it: the name that torch.hub keeps it under, and its address."""

    filename: str
    url: str


@dataclass(frozen=True)
class Model:
    """A published model. ``geometry`` is the family's own type, compared with what a file's shapes say.

    ``licence`` is the Hub's name of what its authors published it under. ``block_chunks`` is how many lists its
    file's blocks are in; 0 where they are in one.
    """

    name: str
    published_name: str
    geometry: Any
    licence: str
    image_processor: Mapping[str, Any]
    backbone: RemoteFile
    head: RemoteFile | None = None
    block_chunks: int = 0


@dataclass(frozen=True)
class ExtraPrefix:
    """What may stand beside a backbone or in it and is none of its tensors: all whose names begin with ``start``.

    ``is_left_out`` says whether it is a matter of course to leave it out; else that takes the user's word.
    """

    start: str
    reason: str
    is_left_out: bool = True


@dataclass(frozen=True)
class Family:
    """``geometry`` reads sizes from tensor shapes, ``layout`` turns them into rules and configuration.

    A geometry has ``heads``, the number of attention heads if someone said it: no shape does. ``flat_name`` is
    the rules' name of a key as files spell it, ``chunked_name`` that spelling of it for a number of layers and
    of chunks. ``image_processor`` is what a model that was never published gets.

    ``in_memory_name`` is what transformers calls a target once it is loaded: it saves, and so cuts
    shards, in the order of those names.

    For model cards: ``organisation`` is the authors' on the Hub; ``pipeline_tags`` say by architecture what
    the Hub calls a model's task.
    """

    name: str
    signature: frozenset[str]
    models: tuple[Model, ...]
    geometry: Callable[[Mapping[str, TensorInfo]], Any]
    layout: Callable[[Any], ConversionSpec]
    image_processor: Mapping[str, Any]
    in_memory_name: Callable[[str], str]
    organisation: str
    pipeline_tags: Mapping[str, str]
    apart: tuple[ExtraPrefix, ...]
    flat_name: Callable[[str], str]
    chunked_name: Callable[[str, int, int], str]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All that any of its models has, since between them the published ones have all."""
        return tuple(rule for model in self.models for rule in self.layout(model.geometry).rules)

    def title_of(self, model: Model | None) -> str:
        """What to call a checkpoint that is this published model, or none of them."""
        return model.name if model else f"a {self.name} model of its own sizes"

    def sources(self, geometry: Any, block_chunks: int = 0) -> dict[str, TensorInfo]:
        """Every tensor of a float32 checkpoint of these sizes; a head's stand under `HEAD_PREFIX`."""
        layout = self.layout(geometry)
        keys = expand(layout.rules, layout.dims, layout.count)
        infos = {key: TensorInfo("F32", shape) for key, (_, shape, _) in keys.items()}
        if not block_chunks:
            return infos
        return {self.chunked_name(key, layout.count, block_chunks): info for key, info in infos.items()}


# What a configuration may say otherwise, and the model computes the same at inference.
_FREE_KEYS = frozenset(
    {"attention_probs_dropout_prob", "drop_path_rate", "hidden_dropout_prob", "initializer_range", "layerscale_value",
     "apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names"}
)  # fmt: skip


def config_problems(layout: ConversionSpec, config: Mapping[str, Any]) -> list[str]:
    """Where a model's config.json says what another model than this layout's would compute."""
    return [
        f"its config.json says {key} {config[key]!r}, and streamconv's models have {value!r}"
        for key, value in layout.config.items()
        if key not in _FREE_KEYS and config.get(key, value) != value
    ]
