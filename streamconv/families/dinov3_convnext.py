"""DINOv3's ConvNeXt (Siméoni et al. 2025, https://github.com/facebookresearch/dinov3) to DINOv3ConvNextModel.

The names on the right are those in transformers' files, which 4.x and 5.x both write and read; 5.x puts "model." before
those of the stages in memory.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from streamconv.families.aspects import DecidingValues
from streamconv.families.base import ConversionSpec, Family, Model
from streamconv.families.dinov3_release import (
    EXTRA_PREFIXES,
    IMAGE_PROCESSOR,
    LICENCE,
    LICENCE_LINK,
    ORGANISATION,
    published_file,
)
from streamconv.families.rules import Rule, count_of, drop, rename
from streamconv.families.sizes import epsilon_in, most_common_size, size_of
from streamconv.tensors.info import TensorInfo

INDEXES = "abcd"  # of the blocks of each stage, which have different numbers of them
PATCH = 32  # pixels: the stem divides the sides of an image by 4, and each of the three other downsamplings by 2
PARTS = ("weight", "bias")
_ONE_NORM = "the file has no norms.3, as the authors' files have, so it may be another ConvNeXt than DINOv3's"


@dataclass(frozen=True)
class Dimensions:
    """The numbers of blocks and of channels of each stage, and of an image's channels.

    ``has_last_norm``: the file has the last norm under its name, norm. ``has_norms``: it has it under a second name,
    norms.3, as Meta's code saves it; ``are_norms_equal`` is false if their values differ. ``epsilon`` is that of the
    norms; only a config.json can show another one than the authors'.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    channels: int = 3
    has_norms: bool = True
    has_last_norm: bool = True
    are_norms_equal: bool = True
    epsilon: float = 1e-6


def read_dimensions(infos: Mapping[str, TensorInfo]) -> Dimensions:
    """Read sizes from shapes. For a tensor that is missing or has the wrong shape, assume a likely size."""

    def width(stage: int) -> int:
        block, convolution = f"stages.{stage}.0.", f"downsample_layers.{stage}.{min(stage, 1)}."
        places = ((block + "gamma", 0, 1), (block + "norm.weight", 0, 1), (block + "dwconv.weight", 0, 4),
                  (convolution + "weight", 0, 4), (convolution + "bias", 0, 1))  # fmt: skip
        return most_common_size(infos, places)

    stages = range(len(INDEXES))
    return Dimensions(
        depths=tuple(count_of(f"stages.{stage}.{{i}}.gamma", infos) for stage in stages),
        widths=tuple(map(width, stages)),
        channels=size_of(infos, "downsample_layers.0.0.weight", 1, 4) or 3,
        has_norms=any(f"norms.3.{part}" in infos for part in PARTS),
        has_last_norm=any(f"norm.{part}" in infos for part in PARTS),
    )


def rules(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the rules for every key. Symbols: W0 to W3 the channels of each stage, C those of an image."""
    yield from _both("downsample_layers.0.0", "stages.0.downsample_layers.0", "W0 C 4 4")
    yield from _both("downsample_layers.0.1", "stages.0.downsample_layers.1", "W0")
    for stage in range(1, len(INDEXES)):
        source, target = f"downsample_layers.{stage}", f"stages.{stage}.downsample_layers"
        yield from _both(f"{source}.0", f"{target}.0", f"W{stage - 1}")
        yield from _both(f"{source}.1", f"{target}.1", f"W{stage} W{stage - 1} 2 2")
    for stage, index in enumerate(INDEXES):
        block, layer, width = f"stages.{stage}.{{{index}}}", f"stages.{stage}.layers.{{{index}}}", f"W{stage}"
        yield rename(f"{block}.gamma", f"{layer}.gamma", width)
        yield from _both(f"{block}.dwconv", f"{layer}.depthwise_conv", f"{width} 1 7 7")
        yield from _both(f"{block}.norm", f"{layer}.layer_norm", width)
        yield from _both(f"{block}.pwconv1", f"{layer}.pointwise_conv1", f"4{width} {width}")
        yield from _both(f"{block}.pwconv2", f"{layer}.pointwise_conv2", f"{width} 4{width}")
    yield from _both("norm", "layer_norm", "W3")
    for part in PARTS if sizes.has_norms else ():
        reason = f"the same tensor as norm.{part}, which the authors' model has under two names"
        yield drop(f"norms.3.{part}", reason, "W3", copy_of=f"norm.{part}")


def _both(source: str, target: str, shape: str) -> Iterator[Rule]:
    """Yield the rules for a weight of this shape and its bias."""
    yield rename(f"{source}.weight", f"{target}.weight", shape)
    yield rename(f"{source}.bias", f"{target}.bias", shape.split()[0])


def conversion_spec(sizes: Dimensions) -> ConversionSpec:
    """Return the rules and the configuration for these sizes."""
    problems = [f"stage {stage} has no blocks" for stage, depth in enumerate(sizes.depths) if not depth]
    if not sizes.has_last_norm:
        problems.append(
            "the last norm is missing. If transformers' DINOv3ConvNextBackbone wrote the file, which has none, save "
            "the model as DINOv3ConvNextModel"
        )
    if not sizes.are_norms_equal:
        problems.append(
            "norms.3 and norm are one tensor in the authors' model, but their values differ in this file: the authors' "
            "code would use those of norms.3, and transformers has only one. Give both the same values"
        )
    dims = {f"W{stage}": width for stage, width in enumerate(sizes.widths)}
    stages = ["stem", *(f"stage{i}" for i in range(1, len(INDEXES) + 1))]
    return ConversionSpec(
        rules=tuple(rules(sizes)),
        dims={"C": sizes.channels, **dims, **{f"4{symbol}": 4 * width for symbol, width in dims.items()}},
        counts=dict(zip(INDEXES, sizes.depths, strict=True)),
        architecture="DINOv3ConvNextModel",
        config={
            "model_type": "dinov3_convnext",
            "depths": [*sizes.depths],
            "drop_path_rate": 0.0,
            "hidden_act": "gelu",
            "hidden_sizes": [*sizes.widths],
            "image_size": 224,
            "initializer_range": 0.02,
            "layer_norm_eps": sizes.epsilon,
            "layer_scale_init_value": 1e-6,
            "num_channels": sizes.channels,
            "out_features": stages[-1:],
            "out_indices": [len(INDEXES)],
            "stage_names": stages,
        },
        problems=tuple(problems),
        notes=() if sizes.has_norms else (_ONE_NORM,),
    )


def with_config(sizes: Dimensions, config: Mapping[str, Any]) -> Dimensions:
    """Return the sizes with the epsilon of a config.json."""
    epsilon = epsilon_in(config)
    return sizes if epsilon is None else replace(sizes, epsilon=epsilon)


def loaded_keys(target: str) -> tuple[str, ...]:
    """Return the name that ``target`` has in memory, in transformers 5."""
    return (f"model.{target}" if target.startswith("stages.") else target,)


def _digest(key: str, values: Sequence[float]) -> str:
    return sha256(array("d", values).tobytes()).hexdigest()


def _with_digests(sizes: Dimensions, digests: Mapping[str, str]) -> Dimensions:
    pairs = [(digests.get(f"norm.{part}"), digests.get(f"norms.3.{part}")) for part in PARTS]
    return replace(sizes, are_norms_equal=all(one == other or None in (one, other) for one, other in pairs))


def _models() -> Iterator[Model]:
    for word, depths, widths, digest in (
        ("tiny", (3, 3, 9, 3), (96, 192, 384, 768), "21b726bb"),
        ("small", (3, 3, 27, 3), (96, 192, 384, 768), "296db49d"),
        ("base", (3, 3, 27, 3), (128, 256, 512, 1024), "801f2ba9"),
        ("large", (3, 3, 27, 3), (192, 384, 768, 1536), "61fa432d"),
    ):
        yield Model(
            f"dinov3_convnext_{word}",
            f"dinov3-convnext-{word}-pretrain-lvd1689m",
            Dimensions(depths, widths),
            LICENCE,
            published_file(f"convnext_{word}", "lvd1689m", digest),
            IMAGE_PROCESSOR.default,
            licence_link=LICENCE_LINK,
        )


FAMILY = Family(
    name="dinov3_convnext",
    signature=frozenset(
        {"downsample_layers.0.0.weight", "downsample_layers.3.1.weight", "stages.0.0.gamma", "stages.3.0.dwconv.weight",
         "norm.weight"}
    ),
    models=tuple(_models()),
    read_dimensions=read_dimensions,
    conversion_spec=conversion_spec,
    organisation=ORGANISATION,
    pipeline_tags={"DINOv3ConvNextModel": "image-feature-extraction"},
    free_config_keys=frozenset(
        {"drop_path_rate", "image_size", "initializer_range", "layer_scale_init_value", "out_features", "out_indices",
         "stage_names"}
    ),
    untensored_config_keys=frozenset({"hidden_act", "layer_norm_eps"}),
    patch_size=lambda config: PATCH,
    with_config=with_config,
    loaded_keys=loaded_keys,
    extra_prefixes=EXTRA_PREFIXES,
    image_processor=IMAGE_PROCESSOR,
    deciding_values=DecidingValues(
        frozenset(f"{norm}.{part}" for norm in ("norm", "norms.3") for part in PARTS).__contains__,
        _digest,
        _with_digests,
    ),
)  # fmt: skip
