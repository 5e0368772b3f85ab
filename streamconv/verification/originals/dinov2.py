"""DINOv2 for inference, after Meta's dinov2/models/vision_transformer.py, or after timm's for files in its layout.

Parameters, attributes and methods have Meta's names, and operations Meta's order. So its files load
strictly, the results are equal bit for bit, and `states` can run Meta's code as well as this one.
Training and masks are omitted, and so are chunks of blocks, which do not change the results.
The same is true of `TimmVisionTransformer` and timm's code.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamconv.families.base import Model
from streamconv.families.dinov2_geometry import Dimensions
from streamconv.verification.originals import KnownDifference, OriginalArchitecture
from streamconv.verification.originals.dinov2_layers import PatchEmbed, block
from streamconv.verification.originals.hub import load_without_weights, require_model

REPOSITORY = "facebookresearch/dinov2"
RESIZED_POSITIONS = KnownDifference(
    changes="the original resizes position embeddings differently, which changes outputs",
    for_check="it resized them like transformers",
    explanation=(
        "At sizes other than the native one, position embeddings are interpolated from N to n patches per side. Meta's "
        "code scales them by (n + 0.1) / N, and transformers by n / N. So the two differ for any weights. "
        "For the check above, both models interpolated like transformers."
    ),
)
TIMMS_POSITIONS = replace(
    RESIZED_POSITIONS,
    explanation=(
        "At sizes other than the native one, position embeddings are interpolated to the grid of patches. timm's code "
        "uses an antialiasing filter, and transformers does not, since the model has no registers. So the two differ "
        "for any weights. For the check above, both models interpolated like transformers."
    ),
)
INTERPOLATE_OFFSET = 0.1  # positions are scaled by (n + 0.1) / 37; models with registers have no offset


class VisionTransformer(nn.Module):
    """The backbone, with a linear head if the sizes have classes."""

    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.patch_size = sizes.patch
        self.num_register_tokens = sizes.registers
        self.register_key = sizes.register_key
        self.interpolate_offset = 0.0 if sizes.registers else INTERPOLATE_OFFSET
        self.interpolate_antialias = bool(sizes.registers)
        self.patch_embed = PatchEmbed(sizes)
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.hidden))
        self.pos_embed = nn.Parameter(torch.empty(1, sizes.source_positions, sizes.hidden))
        if sizes.registers or sizes.has_empty_registers:
            self.register_parameter(sizes.register_key, nn.Parameter(torch.empty(1, sizes.registers, sizes.hidden)))
        if sizes.has_mask_token:
            self.register_parameter(sizes.mask_key, nn.Parameter(torch.empty(1, sizes.hidden)))
        self.blocks = nn.ModuleList(block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.hidden, eps=sizes.epsilon)
        if sizes.classes:
            self.linear_head = nn.Linear(2 * sizes.hidden, sizes.classes)

    def prepare_tokens_with_masks(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.interpolate_pos_encoding(x, *pixels.shape[2:])
        if self.num_register_tokens:
            registers = self.get_parameter(self.register_key).expand(x.shape[0], -1, -1)
            x = torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)
        return x

    def interpolate_pos_encoding(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return the position embeddings, (1, 1 + P, D), for the grid of an image of this size.

        They are scaled by Meta's factor or, without an offset, resized to the grid.
        """
        if x.shape[1] == self.pos_embed.shape[1] and height == width:
            return self.pos_embed
        positions = self.pos_embed.float()
        side = math.isqrt(positions.shape[1] - 1)
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        rows, columns = height // self.patch_size, width // self.patch_size
        if self.interpolate_offset:
            scale = tuple((n + self.interpolate_offset) / side for n in (rows, columns))
            grid = functional.interpolate(
                grid, scale_factor=scale, mode="bicubic", antialias=self.interpolate_antialias
            )
        else:
            grid = functional.interpolate(
                grid, size=(rows, columns), mode="bicubic", antialias=self.interpolate_antialias
            )
        grid = grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)
        return torch.cat((positions[:, :1], grid), dim=1).to(x.dtype)


class TimmVisionTransformer(VisionTransformer):
    """timm's model, whose first ``embedded`` tokens have position embeddings, which precede those of the patches.

    Registers and their position embeddings are added in the weights' dtype, in which the converted model has the sum.
    """

    weights_dtype = torch.float32

    def __init__(self, sizes: Dimensions):
        super().__init__(sizes)
        self.embedded = sizes.embedded_tokens

    def prepare_tokens_with_masks(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        x = x + self.interpolate_pos_encoding(x, *pixels.shape[2:])
        tokens: Tensor = self.cls_token
        if self.embedded:
            tokens = tokens + self.pos_embed[:, :1]
        if self.num_register_tokens:
            registers: Tensor = self.get_parameter(self.register_key)
            if self.embedded > 1:
                added = self.pos_embed[:, 1 : self.embedded].to(self.weights_dtype)
                registers = (registers.to(self.weights_dtype) + added).to(x.dtype)
            tokens = torch.cat((tokens, registers), dim=1)
        return torch.cat((tokens.expand(x.shape[0], -1, -1), x), dim=1)

    def interpolate_pos_encoding(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return the patches' position embeddings, (1, P, D), resized to the grid of an image of this size."""
        positions: Tensor = self.pos_embed[:, self.embedded :]
        if x.shape[1] == positions.shape[1] and height == width:
            return positions
        side, size = math.isqrt(positions.shape[1]), (height // self.patch_size, width // self.patch_size)
        grid = positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=size, mode="bicubic", antialias=self.interpolate_antialias)
        return grid.permute(0, 2, 3, 1).reshape(1, size[0] * size[1], -1).to(x.dtype)


def build(sizes: Dimensions) -> VisionTransformer:
    return (TimmVisionTransformer if sizes.is_timm else VisionTransformer)(sizes)


def load(repository: str, source: str, model: Model) -> Any:
    """Load Meta's own model, with its head moved into it as in `VisionTransformer`. Runs the repository's code."""
    entry = model.name.removesuffix("_1layer")
    if model.head is None:
        loaded = load_without_weights(repository, entry, source)
    else:
        classifier = load_without_weights(repository, f"{entry}_lc", source, layers=1)
        loaded = classifier.backbone
        loaded.linear_head = classifier.linear_head
    original = require_model(loaded, "prepare_tokens_with_masks")
    _use_torch_attention(original)
    return original


def _use_torch_attention(original: nn.Module) -> None:
    """Make Meta's code use torch's attention: that of xFormers, if installed, needs a GPU and has no float64.

    Meta's attention reads a global of its module. The modules are this model's own: see `reference`.
    """
    for module in original.modules():
        namespace = getattr(type(module).forward, "__globals__", {})
        if "XFORMERS_AVAILABLE" in namespace:
            namespace["XFORMERS_AVAILABLE"] = False


def states(model: Any, pixels: Tensor, as_transformers: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Run Meta's model or ours on ``pixels``, (B, C, H, W), and yield each layer's output by name.

    Yields "embeddings" and "layer 0", "layer 1", …, (B, T, D) each; after the last norm "cls" (B, 1, D),
    "registers" (B, R, D) if the model has them, and "patches" (B, P, D); and "logits" (B, K) if it has a head.
    At other sizes than the native one, positions are interpolated by Meta's factor or, with
    ``as_transformers``, to the grid's size, as transformers does since its pull request 33226. timm interpolates to the
    grid's size, always with an antialiasing filter, which transformers uses for models with registers only.
    """
    registers = model.num_register_tokens
    if isinstance(model, TimmVisionTransformer):
        model.interpolate_antialias = bool(registers) or not as_transformers
    else:
        model.interpolate_offset = 0.0 if as_transformers or registers else INTERPOLATE_OFFSET
    x = model.prepare_tokens_with_masks(pixels)
    yield "embeddings", x
    for i, layer in enumerate(model.blocks):
        x = layer(x)
        yield f"layer {i}", x
    x = model.norm(x)
    cls, patches = x[:, :1], x[:, 1 + registers :]
    yield "cls", cls
    if registers:
        yield "registers", x[:, 1 : 1 + registers]
    yield "patches", patches
    if hasattr(model, "linear_head"):
        yield "logits", model.linear_head(torch.cat((cls[:, 0], patches.mean(dim=1)), dim=1))


def prefix_tokens(sizes: Dimensions) -> dict[str, int]:
    return {"cls": 1, **({"registers": sizes.registers} if sizes.registers else {})}


def known_difference(sizes: Dimensions, is_native: bool) -> KnownDifference | None:
    if is_native or sizes.registers:
        return None
    return TIMMS_POSITIONS if sizes.is_timm else RESIZED_POSITIONS


ARCHITECTURE = OriginalArchitecture(
    repository=REPOSITORY,
    build=build,
    load=load,
    states=states,
    prefix_tokens=prefix_tokens,
    known_difference=known_difference,
)
