"""The dimensions of a DINOv3 vision transformer: what its tensors show, and what the values of small ones decide."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from streamconv.families.rules import count_of
from streamconv.tensors.info import TensorInfo

BLOCK = "blocks.{i}."
PERIODS = "rope_embed.periods"
ROPE_BASE = 100.0
# Channels of an attention head by hidden size, in the published models. A file in the authors' layout shows them.
PUBLISHED_HEAD_SIZES = {384: 64, 768: 64, 1024: 64, 1280: 64, 4096: 128}
_IN_BLOCK = re.compile(r"blocks\.\d+\.(.+)")
_BIAS_MASK = re.compile(r"blocks\.\d+\.attn\.qkv\.bias_mask")
_BIAS = re.compile(r"blocks\.\d+\.attn\.qkv\.bias")
MAX_ROUNDING = 2.0**-8  # of periods that were computed in bfloat16: at most two units of its 8 bits, relative to them
_FLOAT32_ROUNDING = 1e-6

Bias = Literal["none", "query and value", "all", "zero", "product", "product with key", "not finite"]


@dataclass(frozen=True)
class Dimensions:
    """Sizes that a checkpoint's shapes show. ``ffn`` is the width inside the feed-forward layer.

    ``head_size`` is the number of channels of an attention head, 0 if neither the file nor published models show it;
    ``heads`` is None unless the number of heads was given. ``has_local_norm``: there is a norm for the CLS tokens of
    local crops, which only training uses. ``epsilon`` is that of the layer norms.

    ``bias`` is what becomes of the bias of queries, keys and values, which is multiplied by a mask in most models:

    - "none": there is none;
    - "query and value": the mask only removes the part for keys, so that the other two are copied;
    - "all": there is no mask, and all three parts are copied;
    - "zero": the mask is 0;
    - "product", "product with key": another mask, which changes the values; the second keeps a part for keys;
    - "not finite": the mask was never initialized.

    The remaining fields say in what the file differs from the authors' without being another model. ``has_cls_norm``
    and ``has_rms_norm`` are variants that transformers' class does not have.
    """

    hidden: int
    layers: int
    ffn: int
    is_gated: bool = False
    bias: Bias = "query and value"
    head_size: int = 64
    registers: int = 4
    patch: int = 16
    channels: int = 3
    has_local_norm: bool = False
    has_layer_scale: bool = True
    has_proj_bias: bool = True
    has_ffn_bias: bool = True
    has_cls_norm: bool = False
    has_rms_norm: bool = False
    heads: int | None = None
    epsilon: float = 1e-5
    has_periods: bool = field(default=True, compare=False)
    has_bias_mask: bool = field(default=True, compare=False)
    periods: Literal["exact", "rounded", "others"] = field(default="rounded", compare=False)

    @property
    def num_heads(self) -> int:
        """The number of attention heads; 0 if it was not given, and neither periods nor published models show it."""
        return self.heads or (self.hidden // self.head_size if self.head_size else 0)


def read_dimensions(infos: Mapping[str, TensorInfo]) -> Dimensions:
    """Read sizes from shapes. For a tensor that is missing or has the wrong shape, assume a likely size."""

    def size(key: str, axis: int, ndim: int, default: int) -> int:
        shape = infos[key].shape if key in infos else ()
        return shape[axis] if len(shape) == ndim else default

    in_blocks = {match[1] for match in map(_IN_BLOCK.fullmatch, infos) if match is not None}
    places = (("cls_token", 2, 3), ("mask_token", 1, 2), ("patch_embed.proj.weight", 0, 4), ("norm.weight", 0, 1))
    sizes = [each for each in (size(*place, 0) for place in places) if each]
    hidden = max(sizes, key=sizes.count, default=0)  # so that one wrong tensor is reported, not all others
    is_gated = "mlp.w3.weight" in in_blocks
    ffn = size("blocks.0.mlp.w3.weight", 1, 2, 0) if is_gated else size("blocks.0.mlp.fc1.weight", 0, 2, 0)
    # Only a file in the authors' layout has periods, masks, and the norm for local crops.
    has_periods = PERIODS in infos
    has_bias, has_mask = "attn.qkv.bias" in in_blocks, "attn.qkv.bias_mask" in in_blocks
    has_norm_bias = "norm.bias" in infos or not {"norm1.bias", "norm2.bias"}.isdisjoint(in_blocks)
    registers = size("storage_tokens", 1, 3, 4) if "storage_tokens" in infos else 0
    is_masked = has_mask or not has_periods
    return Dimensions(
        hidden=hidden,
        layers=count_of(BLOCK + "norm1.weight", infos),
        ffn=ffn or 4 * hidden,
        is_gated=is_gated,
        bias=("query and value" if is_masked else "all") if has_bias else "none",
        head_size=4 * size(PERIODS, 0, 1, 0) if has_periods else PUBLISHED_HEAD_SIZES.get(hidden, 0),
        registers=registers,
        patch=size("patch_embed.proj.weight", 3, 4, 16),
        channels=size("patch_embed.proj.weight", 1, 4, 3),
        has_local_norm=any(name.startswith("local_cls_norm.") for name in infos),
        has_layer_scale=not {"ls1.gamma", "ls2.gamma"}.isdisjoint(in_blocks),
        has_proj_bias="attn.proj.bias" in in_blocks,
        has_ffn_bias=any(name.startswith("mlp.") and name.endswith(".bias") for name in in_blocks),
        has_cls_norm=any(name.startswith("cls_norm.") for name in infos),
        has_rms_norm="norm.weight" in infos and not has_norm_bias,
        epsilon=1e-5 if registers or is_masked else 1e-6,
        has_periods=has_periods,
        has_bias_mask=has_mask,
    )


def is_deciding(key: str) -> bool:
    """Return whether the values of this tensor decide how others are converted."""
    return key == PERIODS or _BIAS.fullmatch(key) is not None or _BIAS_MASK.fullmatch(key) is not None


def summarise(key: str, values: Sequence[float]) -> str:
    """Return what matters about a tensor's values in one word."""
    if key == PERIODS:
        return _summarise_periods(values)
    if not all(map(math.isfinite, values)):
        return "not finite"
    if not any(values):
        return "zero"
    if _BIAS.fullmatch(key):
        return "others"
    third = len(values) // 3
    query, key_part, value = ({*values[i * third : (i + 1) * third]} for i in range(3))
    if key_part == {0.0}:
        return "query and value" if query == value == {1.0} else "without key"
    return "others"


def _summarise_periods(values: Sequence[float]) -> str:
    """Compare periods with those that transformers computes, 100 ** (i / n): "exact", "rounded" or "others"."""
    expected = [ROPE_BASE ** (i / len(values)) for i in range(len(values))]
    error = max((abs(value / right - 1) for value, right in zip(values, expected, strict=True)), default=math.inf)
    return "exact" if error < _FLOAT32_ROUNDING else "rounded" if error < MAX_ROUNDING else "others"


def with_summaries(sizes: Dimensions, summaries: Mapping[str, str]) -> Dimensions:
    """Return the sizes with what the values of masks, biases and periods decide."""
    periods: Any = summaries.get(PERIODS, sizes.periods)
    masks = {key: summary for key, summary in summaries.items() if _BIAS_MASK.fullmatch(key)}
    found = {*masks.values()}
    biases = {summaries.get(key.removesuffix("_mask"), "others") for key in masks}
    bias: Bias = sizes.bias
    if "not finite" in found:
        bias = "not finite"
    elif found and (found == {"query and value"} or biases == {"zero"}):
        bias = "query and value"
    elif found == {"zero"}:
        bias = "zero"
    elif found:
        bias = "product with key" if "others" in found else "product"
    return replace(sizes, periods=periods, bias=bias)


def with_heads(sizes: Dimensions, heads: int) -> Dimensions:
    """Return the sizes with a number of attention heads; unchanged if they have it already."""
    return sizes if heads == replace(sizes, heads=None).num_heads else replace(sizes, heads=heads)


def has_published_heads(sizes: Dimensions) -> bool:
    return sizes.heads is None and sizes.hidden in PUBLISHED_HEAD_SIZES


def reason_for_heads(sizes: Dimensions) -> str:
    """Say why `Dimensions.num_heads` has its value if the file has no periods."""
    return f"{sizes.head_size} channels each, as in the family's published models"


def with_config(sizes: Dimensions, config: Mapping[str, Any]) -> Dimensions:
    """Return the sizes with what only a config.json of transformers shows."""
    epsilon: Any = config.get("layer_norm_eps")
    if type(epsilon) in (int, float) and 0 < epsilon < 1:
        sizes = replace(sizes, epsilon=float(epsilon))
    return replace(sizes, bias="all") if config.get("key_bias") is True and sizes.bias != "none" else sizes
