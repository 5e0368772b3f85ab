"""DINOv3's vision transformers for inference, after Meta's dinov3/models/vision_transformer.py and layers/.

Parameters, buffers, attributes and methods have Meta's names, and operations Meta's order. So its files load strictly,
the results are equal bit for bit, and `states` can run Meta's code as well as this one. Training is omitted.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamconv.families.base import Model
from streamconv.families.dinov3_geometry import MAX_ROUNDING, ROPE_BASE, Dimensions
from streamconv.verification.originals import KnownDifference, OriginalArchitecture
from streamconv.verification.originals.hub import load_without_weights, require_model
from streamconv.verification.originals.layers import Block, Mlp

REPOSITORY = "facebookresearch/dinov3"
ROUNDED_PERIODS = KnownDifference(
    changes="the original's RoPE periods, which its file rounds to bfloat16, change outputs",
    for_check="it used transformers' float32 periods",
    explanation=(
        "The angles by which RoPE rotates queries and keys depend on periods. The original's file stores them rounded "
        "to bfloat16, and transformers computes them in float32. So the two differ for any weights. For the check "
        "above, both models used the same periods."
    ),
)


class RopePositionEmbedding(nn.Module):
    """RoPE: rotates the queries and keys of a patch, half of the channels by its row, half by its column."""

    def __init__(self, sizes: Dimensions):
        super().__init__()
        periods = ROPE_BASE ** torch.arange(0, 1, 4 * sizes.num_heads / sizes.hidden, dtype=torch.float32)
        self.register_buffer("periods", periods, persistent=sizes.is_original)

    def forward(self, *, H: int, W: int) -> tuple[Tensor, Tensor]:
        """Return sines and cosines for a grid of this height and width, (H * W, head size) each."""
        periods: Any = self.periods
        angles = 2 * math.pi * patch_coordinates(H, W, periods.device)[:, :, None] / periods[None, None, :]
        angles = angles.flatten(1, 2).tile(2)
        return torch.sin(angles), torch.cos(angles)


def patch_coordinates(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the centres of patches, (rows * columns, 2), from -1 to 1."""
    y = torch.arange(0.5, rows, device=device, dtype=torch.float32) / rows
    x = torch.arange(0.5, columns, device=device, dtype=torch.float32) / columns
    return 2.0 * torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1) - 1.0


class LinearKMaskedBias(nn.Linear):
    """A linear layer whose bias is multiplied by a mask, which usually removes the part for keys."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias=bias)
        if bias:
            self.register_buffer("bias_mask", torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        mask: Any = self.bias_mask if self.bias is not None else None
        bias = self.bias * mask.to(self.bias.dtype) if self.bias is not None else None
        return functional.linear(x, self.weight, bias)


class SelfAttention(nn.Module):
    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.num_heads = sizes.num_heads
        linear = LinearKMaskedBias if sizes.mask and sizes.is_original else nn.Linear
        self.qkv = linear(sizes.hidden, 3 * sizes.hidden, bias=sizes.has_bias)
        self.proj = nn.Linear(sizes.hidden, sizes.hidden, bias=sizes.has_proj_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, hidden // self.num_heads)
        query, key, value = (part.transpose(1, 2) for part in torch.unbind(qkv, 2))
        query, key = _rotate(query, *rope), _rotate(key, *rope)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape([batch, tokens, hidden]))  # type: ignore[no-any-return]


def _rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the patches, the last of the tokens of ``x``, (B, heads, T, size), in the dtype of ``sin`` and ``cos``."""
    dtype = x.dtype
    x = x.to(sin.dtype)
    prefix = x.shape[-2] - sin.shape[-2]
    patches = x[:, :, prefix:, :]
    first, second = patches.chunk(2, dim=-1)
    patches = (patches * cos) + (torch.cat([-second, first], dim=-1) * sin)
    return torch.cat((x[:, :, :prefix, :], patches), dim=-2).to(dtype)


class SwiGLUFFN(nn.Module):
    def __init__(self, hidden: int, width: int, has_bias: bool):
        super().__init__()
        self.w1 = nn.Linear(hidden, width, bias=has_bias)
        self.w2 = nn.Linear(hidden, width, bias=has_bias)
        self.w3 = nn.Linear(width, hidden, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w2(x)
        return self.w3(functional.silu(gate) * up)  # type: ignore[no-any-return]


def _block(sizes: Dimensions) -> Block:
    mlp = (SwiGLUFFN if sizes.is_gated else Mlp)(sizes.hidden, sizes.ffn, sizes.has_ffn_bias)
    return Block(sizes.hidden, sizes.epsilon, SelfAttention(sizes), mlp, sizes.has_layer_scale)


class PatchEmbed(nn.Module):
    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.proj = nn.Conv2d(sizes.channels, sizes.hidden, sizes.patch, stride=sizes.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return patches, (B, H, W, D)."""
        x = self.proj(pixels)
        rows, columns = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        return x.reshape(-1, rows, columns, x.shape[-1])  # type: ignore[no-any-return]


class DinoVisionTransformer(nn.Module):
    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.patch_embed = PatchEmbed(sizes)
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.hidden))
        self.n_storage_tokens = sizes.registers
        if sizes.registers or sizes.has_empty_registers:
            self.storage_tokens = nn.Parameter(torch.empty(1, sizes.registers, sizes.hidden))
        self.rope_embed = RopePositionEmbedding(sizes)
        self.blocks = nn.ModuleList(_block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.hidden, eps=sizes.epsilon)
        if sizes.has_local_norm and sizes.is_original:  # in the file, but used only for local crops in training
            self.local_cls_norm = nn.LayerNorm(sizes.hidden, eps=sizes.epsilon)
        self.mask_token = nn.Parameter(torch.empty(1, sizes.hidden))

    def prepare_tokens_with_masks(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens and the height and width of the grid of patches."""
        x = self.patch_embed(pixels)
        batch, rows, columns, _ = x.shape
        x = x.flatten(1, 2)
        cls_token = self.cls_token + 0 * self.mask_token
        registers = [self.storage_tokens.expand(batch, -1, -1)] if self.n_storage_tokens else []
        return torch.cat([cls_token.expand(batch, -1, -1), *registers, x], dim=1), (rows, columns)


def build(sizes: Dimensions) -> DinoVisionTransformer:
    return DinoVisionTransformer(sizes)


def load(repository: str, source: str, model: Model) -> Any:
    """Load Meta's own model. Runs the repository's code.

    Meta's function builds a model for the weights in a file of this name, which it does not read.
    """
    entry = model.name.partition("_sat")[0]
    loaded = load_without_weights(repository, entry, source, weights=model.backbone.filename)
    return require_model(loaded, "rope_embed")


def states(model: Any, pixels: Tensor, as_transformers: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Run Meta's model or ours on ``pixels``, (B, C, H, W), and yield each layer's output by name.

    Yields "embeddings" and "layer 0", "layer 1", …, (B, T, D) each; after the last norm "cls" (B, 1, D),
    "registers" (B, R, D) if the model has them, and "patches" (B, P, D). RoPE's periods are those of the file or, with
    ``as_transformers``, those that transformers computes.
    """
    x, (rows, columns) = model.prepare_tokens_with_masks(pixels)
    yield "embeddings", x
    for i, block in enumerate(model.blocks):
        angles = _transformers_rope(model, x, rows, columns) if as_transformers else model.rope_embed(H=rows, W=columns)
        x = block(x, angles)
        yield f"layer {i}", x
    x, registers = model.norm(x), model.n_storage_tokens
    yield "cls", x[:, :1]
    if registers:
        yield "registers", x[:, 1 : 1 + registers]
    yield "patches", x[:, 1 + registers :]


def _transformers_rope(model: Any, x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return sines and cosines as transformers computes them: angles in float32, multiplied by inverse periods.

    Raises:
        ValueError: the model's own periods are not those, even if they are rounded to bfloat16.
    """
    size = x.shape[-1] // model.blocks[0].attn.num_heads
    frequencies = (1 / ROPE_BASE ** torch.arange(0, 1, 4 / size, dtype=torch.float32)).to(x.device)
    periods = model.rope_embed.periods
    if periods.shape != frequencies.shape or not ((periods * frequencies - 1).abs() < MAX_ROUNDING).all():
        raise ValueError(f"the file's RoPE periods are not those of base {ROPE_BASE:g}, which transformers computes")
    angles = 2 * math.pi * patch_coordinates(rows, columns, x.device)[:, :, None] * frequencies[None, None, :]
    angles = angles.flatten(1, 2).tile(2)
    return torch.sin(angles).to(x.dtype), torch.cos(angles).to(x.dtype)


def prefix_tokens(sizes: Dimensions) -> dict[str, int]:
    return {"cls": 1, **({"registers": sizes.registers} if sizes.registers else {})}


def known_difference(sizes: Dimensions, is_native: bool) -> KnownDifference | None:
    return ROUNDED_PERIODS if sizes.is_original and sizes.periods == "rounded" else None


ARCHITECTURE = OriginalArchitecture(
    repository=REPOSITORY,
    build=build,
    load=load,
    states=states,
    prefix_tokens=prefix_tokens,
    known_difference=known_difference,
)
