"""The dimensions of a DINOv2 model: what the shapes of its tensors show, and the number of heads, which they do not."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from streamconv.families.rules import count_of
from streamconv.families.sizes import epsilon_in, most_common_size, size_of
from streamconv.tensors.info import TensorInfo

BLOCK = "blocks.{i}."
# Tensors that not every model has in its blocks.
_OPTIONAL = re.compile(
    r"blocks\.\d+\.(?:(?P<layer_scale>ls[12]\.gamma)|attn\.(?:(?P<qkv>qkv)|(?P<proj>proj))\.bias|(?P<ffn>mlp\.\w+)\.bias)"
)
HEAD_PREFIX = "linear_head."  # of the head's keys; in its file they are "weight" and "bias"
MASK_KEYS = ("mask_token", "masked_embed")  # DINOv2's, and that of iBOT, which it comes from
REGISTER_KEYS = ("register_tokens", "reg_token")  # DINOv2's, and timm's
# Attention heads by hidden size: of the published models (DINOv2's and Web-DINO's), and of other vision transformers,
# which do not agree on a number at these sizes.
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1536: 24, 2688: 21, 3072: 24, 3584: 28, 4096: 32}
OTHER_HEADS = {
    1152: "SigLIP so400m has 16",
    1280: "ViT-H has 16, DINOv3's ViT-H+ 20",
    1408: "ViT-g has 16",
    1664: "ViT-bigG has 16, UNI2-g 26",
}
# Channels of a head in the usual vision transformers up to ViT-L: 192 / 3, 384 / 6, 768 / 12, 1024 / 16.
HEAD_SIZE, MAX_USUAL_HIDDEN = 64, 1024


@dataclass(frozen=True)
class Dimensions:
    """Sizes that a checkpoint's shapes show. ``ffn`` is the width inside the feed-forward layer.

    ``head_layers`` is the number of layers whose CLS tokens a linear head reads, beside the mean of the patch tokens.
    ``mask_key`` is the key of the mask token: "masked_embed" in iBOT's files. ``has_empty_registers``: there is a
    tensor of no registers. ``has_proj_bias`` and so on are true if any block has one; ``has_ffn_bias`` is about both
    linear layers of the feed-forward layer.

    ``positions`` is the number of position embeddings of a grid of patches and a CLS token. In timm's files, the ones
    of ``embedded_tokens`` precede those of the patches: of none, of the CLS token, or of it and the registers.
    ``register_key`` is the key of the registers. ``is_packed``: a SwiGLU has timm's names, fc1 and fc2.

    ``heads`` is None unless the number was given; `num_heads` then follows the family's rule. ``epsilon`` is that of
    the layer norms; only a config.json can show another one than the authors'.
    """

    hidden: int
    layers: int
    ffn: int
    swiglu: bool = False
    patch: int = 14
    channels: int = 3
    positions: int = 37 * 37 + 1
    registers: int = 0
    classes: int | None = None
    head_layers: int = 1
    has_layer_scale: bool = True
    has_mask_token: bool = True
    has_qkv_bias: bool = True
    has_proj_bias: bool = True
    has_ffn_bias: bool = True
    has_patch_bias: bool = True
    has_empty_registers: bool = False
    mask_key: str = MASK_KEYS[0]
    register_key: str = REGISTER_KEYS[0]
    embedded_tokens: int = 1
    is_packed: bool = False
    heads: int | None = None
    epsilon: float = 1e-6

    @property
    def source_positions(self) -> int:
        """The number of position embeddings in the source."""
        return self.positions - 1 + self.embedded_tokens

    @property
    def has_ambiguous_positions(self) -> bool:
        """True if the shapes fit a grid with and without position embeddings of the CLS token and the registers."""
        others = self.source_positions - 1 - self.registers
        return self.register_key == REGISTER_KEYS[1] and not self.embedded_tokens and is_square(others)

    @property
    def is_timm(self) -> bool:
        """True if the source has a layout of timm's that differs from the authors'."""
        return self.is_packed or self.embedded_tokens != 1 or self.register_key != REGISTER_KEYS[0]

    @property
    def num_heads(self) -> int:
        """The number of attention heads; 0 if it was not given and models of this hidden size do not agree on one."""
        is_usual = self.hidden <= MAX_USUAL_HIDDEN and self.hidden % HEAD_SIZE == 0
        return self.heads or PUBLISHED_HEADS.get(self.hidden, self.hidden // HEAD_SIZE if is_usual else 0)


def ffn_size(hidden: int, mlp_ratio: int, swiglu: bool) -> int:
    """Return the feed-forward width. SwiGLU's is two thirds of the MLP's, rounded up to 8 (Meta's swiglu_ffn.py)."""
    return (int(hidden * mlp_ratio * 2 / 3) + 7) // 8 * 8 if swiglu else hidden * mlp_ratio


def read_dimensions(infos: Mapping[str, TensorInfo]) -> Dimensions:
    """Read sizes from shapes. For a tensor that is missing or has the wrong shape, assume a likely size."""
    size = partial(size_of, infos)
    found = (_OPTIONAL.fullmatch(name) for name in infos)
    in_blocks = {match.lastgroup for match in found if match is not None}
    places = (("cls_token", 2, 3), ("pos_embed", 2, 3), ("patch_embed.proj.weight", 0, 4), ("norm.weight", 0, 1))
    hidden = most_common_size(infos, places)
    head_width = size(HEAD_PREFIX + "weight", 1, 2, 2 * hidden)
    swiglu = "blocks.0.mlp.w12.weight" in infos
    rows, columns = size("blocks.0.mlp.fc1.weight", 0, 2), size("blocks.0.mlp.fc2.weight", 1, 2)
    is_packed = not swiglu and rows == 2 * columns > 0
    ffn = size("blocks.0.mlp.w3.weight", 1, 2) if swiglu else columns if is_packed else rows
    mask_key = next((key for key in MASK_KEYS if key in infos), "")
    register_key = next((key for key in REGISTER_KEYS if key in infos), "")
    registers = size(register_key, 1, 3, 4) if register_key else 0
    # timm's models have no mask token, unlike those of the authors and transformers, whose positions may be missing.
    is_timm, may_be_timm = register_key == REGISTER_KEYS[1], not register_key and not mask_key
    layouts = (0, 1 + registers) if is_timm else (1, 0) if may_be_timm else (1,)
    positions = size("pos_embed", 1, 3, 37 * 37 + layouts[0])
    embedded = next((tokens for tokens in layouts if is_square(positions - tokens)), layouts[0])
    return Dimensions(
        hidden=hidden,
        layers=count_of(BLOCK + "norm1.weight", infos),
        ffn=ffn or ffn_size(hidden, 4, swiglu),
        swiglu=swiglu or is_packed,
        patch=size("patch_embed.proj.weight", 3, 4, 14),
        channels=size("patch_embed.proj.weight", 1, 4, 3),
        positions=positions + 1 - embedded,
        registers=registers,
        classes=size(HEAD_PREFIX + "weight", 0, 2, 1000) if HEAD_PREFIX + "weight" in infos else None,
        head_layers=head_width // hidden - 1 if hidden and head_width % hidden == 0 else 1,
        has_layer_scale="layer_scale" in in_blocks,
        has_mask_token=bool(mask_key),
        has_qkv_bias="qkv" in in_blocks,
        has_proj_bias="proj" in in_blocks,
        has_ffn_bias="ffn" in in_blocks,
        has_patch_bias="patch_embed.proj.bias" in infos,
        has_empty_registers=bool(register_key) and not registers,
        mask_key=mask_key or MASK_KEYS[0],
        register_key=register_key or REGISTER_KEYS[0],
        embedded_tokens=embedded,
        is_packed=is_packed,
    )


def is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def with_heads(sizes: Dimensions, heads: int) -> Dimensions:
    """Return the sizes with a number of attention heads; unchanged if it is that of published models of this size."""
    return sizes if heads == PUBLISHED_HEADS.get(sizes.hidden) else replace(sizes, heads=heads)


def has_published_heads(sizes: Dimensions) -> bool:
    return sizes.heads is None and sizes.hidden in PUBLISHED_HEADS


def reason_for_heads(sizes: Dimensions) -> str:
    """Return the reason for the value of `Dimensions.num_heads`."""
    models = "the family's published models" if has_published_heads(sizes) else "the usual vision transformers"
    return f"{sizes.hidden // max(1, sizes.num_heads)} channels each, as in {models}"


def heads_elsewhere(hidden: int) -> str:
    """Return the reason why no number of heads is assumed for a hidden size."""
    found = f" ({OTHER_HEADS[hidden]})" if hidden in OTHER_HEADS else ""
    return f"models of hidden size {hidden} do not agree on one{found}"


def with_config(sizes: Dimensions, config: Mapping[str, Any]) -> Dimensions:
    """Return the sizes with the epsilon of a config.json."""
    epsilon = epsilon_in(config)
    return sizes if epsilon is None else replace(sizes, epsilon=epsilon)
