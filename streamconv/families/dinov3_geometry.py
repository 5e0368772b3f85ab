"""The dimensions of a DINOv3 vision transformer, read from the shapes of its tensors and the values of small ones."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from streamconv.families.rules import count_of
from streamconv.families.sizes import epsilon_in, most_common_size, size_of
from streamconv.tensors.info import TensorInfo

BLOCK = "blocks.{i}."
PERIODS = "rope_embed.periods"
ROPE_BASE = 100.0
# Channels of an attention head by hidden size, in the published models. A file in the authors' layout shows them.
PUBLISHED_HEAD_SIZES = {384: 64, 768: 64, 1024: 64, 1280: 64, 4096: 128}
_IN_BLOCK = re.compile(r"blocks\.\d+\.(.+)")
_BIAS = re.compile(r"blocks\.\d+\.attn\.qkv\.bias(_mask)?")
MAX_ROUNDING = 2.0**-8  # relative, of periods computed in bfloat16: at most two units in the last of its 8 bits
_FLOAT32_ROUNDING = 1e-6


@dataclass(frozen=True)
class Dimensions:
    """Sizes that a checkpoint's shapes show. ``ffn`` is the width inside the feed-forward layer.

    ``head_size`` is the number of channels of an attention head, 0 if neither the file nor published models show it;
    ``heads`` is None unless the number of heads was given. ``has_local_norm``: there is a norm for the CLS tokens of
    local crops, which only training uses. ``has_cls_norm`` and ``has_rms_norm`` are variants that transformers' class
    does not have. ``epsilon`` is that of the layer norms, which only a config.json shows (``has_epsilon``).

    ``has_empty_registers``: there is a tensor of no registers, as transformers writes it.

    In most models, the bias of queries, keys and values is multiplied by a ``mask``. It is "" without one; "keys" if it
    only removes the bias of keys; "zero" or "mixed" if it removes all or other parts; "nan" if it was not initialized;
    and "missing" if some blocks have none. ``has_key_bias``: a bias of keys remains.

    ``is_original``: the file is in the authors' layout, so that it has RoPE's periods, masks, and the norm for local
    crops. ``periods`` are compared with those that transformers computes.
    """

    hidden: int
    layers: int
    ffn: int
    is_gated: bool = False
    has_bias: bool = True
    has_key_bias: bool = False
    head_size: int = 64
    registers: int = 4
    has_empty_registers: bool = False
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
    has_epsilon: bool = field(default=False, compare=False)
    mask: Literal["", "keys", "zero", "mixed", "nan", "missing"] = field(default="keys", compare=False)
    is_original: bool = field(default=True, compare=False)
    periods: Literal["exact", "rounded", "others"] = field(default="rounded", compare=False)

    @property
    def num_heads(self) -> int:
        """The number of attention heads; 0 if it was not given, and neither periods nor published models show it."""
        return self.heads or (self.hidden // self.head_size if self.head_size else 0)


def read_dimensions(infos: Mapping[str, TensorInfo]) -> Dimensions:
    """Read sizes from shapes. For a tensor that is missing or has the wrong shape, assume a likely size."""
    size = partial(size_of, infos)
    in_blocks = {match[1] for match in map(_IN_BLOCK.fullmatch, infos) if match is not None}
    places = (("cls_token", 2, 3), ("mask_token", 1, 2), ("patch_embed.proj.weight", 0, 4), ("norm.weight", 0, 1))
    hidden = most_common_size(infos, places)
    is_gated = "mlp.w3.weight" in in_blocks
    ffn = size("blocks.0.mlp.w3.weight", 1, 2) if is_gated else size("blocks.0.mlp.fc1.weight", 0, 2)
    is_original = PERIODS in infos
    has_bias, has_mask = "attn.qkv.bias" in in_blocks, "attn.qkv.bias_mask" in in_blocks or not is_original
    has_local_norm = any(name.startswith("local_cls_norm.") for name in infos)
    registers = size("storage_tokens", 1, 3, 4) if "storage_tokens" in infos else 0
    return Dimensions(
        hidden=hidden,
        layers=count_of(BLOCK + "norm1.weight", infos),
        ffn=ffn or 4 * hidden,
        is_gated=is_gated,
        has_bias=has_bias,
        has_key_bias=has_bias and not has_mask,
        head_size=4 * size(PERIODS, 0, 1) if is_original else PUBLISHED_HEAD_SIZES.get(hidden, 0),
        registers=registers,
        has_empty_registers="storage_tokens" in infos and not registers,
        patch=size("patch_embed.proj.weight", 3, 4, 16),
        channels=size("patch_embed.proj.weight", 1, 4, 3),
        # A converted model has none, but the published models of 7B were made from files with this norm.
        has_local_norm=has_local_norm or (not is_original and hidden == 4096),
        has_layer_scale=not {"ls1.gamma", "ls2.gamma"}.isdisjoint(in_blocks),
        has_proj_bias="attn.proj.bias" in in_blocks,
        has_ffn_bias=any(name.startswith("mlp.") and name.endswith(".bias") for name in in_blocks),
        has_cls_norm=any(name.startswith("cls_norm.") for name in infos),
        has_rms_norm="norm.weight" in infos and {"norm1.bias", "norm2.bias"}.isdisjoint(in_blocks),
        # Without storage tokens and masks, training is configured by default, with another epsilon.
        epsilon=1e-5 if registers or has_mask else 1e-6,
        mask="keys" if has_bias and has_mask else "",
        is_original=is_original,
    )


def is_deciding(key: str) -> bool:
    """Return whether the values of this tensor decide how others are converted."""
    return key == PERIODS or _BIAS.fullmatch(key) is not None


def summarise(key: str, values: Sequence[float]) -> str:
    """Classify the values of periods, a mask or a bias with a word."""
    if key == PERIODS:
        return _summarise_periods(values)
    if not all(map(math.isfinite, values)):
        return "nan"
    if not any(values):
        return "zero"
    third = len(values) // 3
    query, of_keys, value = ({*values[i * third : (i + 1) * third]} for i in range(3))
    if of_keys != {0.0}:
        return "with keys"
    return "keys" if query == value == {1.0} else "without keys"


def _summarise_periods(values: Sequence[float]) -> str:
    """Compare periods with those that transformers computes, 100 ** (i / n): "exact", "rounded" or "others"."""
    expected = [ROPE_BASE ** (i / len(values)) for i in range(len(values))]

    def are_within(rounding: float) -> bool:
        return all(abs(value / right - 1) < rounding for value, right in zip(values, expected, strict=True))

    return "exact" if are_within(_FLOAT32_ROUNDING) else "rounded" if are_within(MAX_ROUNDING) else "others"


def with_summaries(sizes: Dimensions, summaries: Mapping[str, str]) -> Dimensions:
    """Return the sizes with the classes of the periods, masks and biases."""
    periods: Any = summaries.get(PERIODS, "others" if sizes.is_original else sizes.periods)
    masks = {key: summary for key, summary in summaries.items() if key.endswith("_mask")}
    biases = {summary for key, summary in summaries.items() if key.endswith(".bias")}
    sizes, found = replace(sizes, periods=periods), {*masks.values()}
    if not sizes.mask:
        return sizes
    if not masks and not sizes.is_original:  # only parameters were saved
        return replace(sizes, has_key_bias=True, mask="") if "with keys" in biases else sizes
    if len(masks) != sizes.layers:
        return replace(sizes, mask="missing")
    if "nan" in found | biases:
        return replace(sizes, mask="nan")
    if found == {"keys"} or biases == {"zero"}:  # zeros are copied as well as multiplied
        return replace(sizes, mask="keys")
    if found == {"zero"}:
        return replace(sizes, mask="zero")
    return replace(sizes, mask="mixed", has_key_bias="with keys" in found)


def with_heads(sizes: Dimensions, heads: int) -> Dimensions:
    """Return the sizes with a number of attention heads; unchanged if they have it already."""
    return sizes if heads == replace(sizes, heads=None).num_heads else replace(sizes, heads=heads)


def has_published_heads(sizes: Dimensions) -> bool:
    return sizes.heads is None and sizes.hidden in PUBLISHED_HEAD_SIZES


def reason_for_heads(sizes: Dimensions) -> str:
    """Return the reason for the value of `Dimensions.num_heads` in a file without periods."""
    return f"{sizes.head_size} channels each, as in the family's published models"


def with_config(sizes: Dimensions, config: Mapping[str, Any]) -> Dimensions:
    """Return the sizes with those values that only a config.json of transformers shows."""
    epsilon = epsilon_in(config)
    if epsilon is not None:
        sizes = replace(sizes, epsilon=epsilon, has_epsilon=True)
    if config.get("key_bias") is True and sizes.has_bias:
        sizes = replace(sizes, has_key_bias=True, mask="")
    if config.get("query_bias") is True and not sizes.has_bias:  # of zeros, which reverting leaves out
        sizes = replace(sizes, has_bias=True, mask="zero")
    return sizes
