"""DINOv2's graph at inference, after Meta's dinov2/models/vision_transformer.py and layers/.

Parameter names and the order of operations are Meta's, so that its files load strictly and its
numbers come out bit for bit; training, masks and chunked blocks are left out.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamconv.families.dinov2 import HEAD_SIZE, Geometry

EPSILON = 1e-6


class Attention(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.heads = hidden // HEAD_SIZE
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        # (B, T, 3, heads, size) to three times (B, heads, T, size)
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, hidden))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden, width)
        self.fc2 = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class SwiGlu(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.w12 = nn.Linear(hidden, 2 * width)
        self.w3 = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, sizes: Geometry):
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.hidden, eps=EPSILON)
        self.attn = Attention(sizes.hidden)
        self.ls1 = LayerScale(sizes.hidden)
        self.norm2 = nn.LayerNorm(sizes.hidden, eps=EPSILON)
        self.mlp = (SwiGlu if sizes.swiglu else Mlp)(sizes.hidden, sizes.ffn)
        self.ls2 = LayerScale(sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    def __init__(self, sizes: Geometry):
        super().__init__()
        self.proj = nn.Conv2d(sizes.channels, sizes.hidden, sizes.patch, stride=sizes.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """The backbone, and a linear head where the sizes have classes."""

    def __init__(self, sizes: Geometry):
        super().__init__()
        self.patch_embed = PatchEmbed(sizes)
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.hidden))
        self.pos_embed = nn.Parameter(torch.empty(1, sizes.positions, sizes.hidden))
        self.mask_token = nn.Parameter(torch.empty(1, sizes.hidden))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.hidden, eps=EPSILON)
        self.linear_head = nn.Linear(2 * sizes.hidden, sizes.classes) if sizes.classes else None

    def states(self, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What the model computes on its way, each by name as it comes.

        ``pixels`` is (B, C, H, W) at the native size: (H / patch) * (W / patch) + 1 positions, square.
        Gives "embeddings" and "layer 0" and so on, (B, T, D) each; "cls" (B, D) and "patches"
        (B, T - 1, D) behind the last norm; and "logits" (B, K) of a classifier.
        """
        x = self.patch_embed(pixels)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if x.shape[1] != self.pos_embed.shape[1] or pixels.shape[2] != pixels.shape[3]:
            raise ValueError(f"the native size is {math.isqrt(self.pos_embed.shape[1] - 1)} patches square")
        x = x + self.pos_embed
        yield "embeddings", x
        for i, block in enumerate(self.blocks):
            x = block(x)
            yield f"layer {i}", x
        x = self.norm(x)
        cls, patches = x[:, 0], x[:, 1:]
        yield "cls", cls
        yield "patches", patches
        if self.linear_head is not None:
            yield "logits", self.linear_head(torch.cat((cls, patches.mean(dim=1)), dim=1))


def build(sizes: Geometry) -> VisionTransformer:
    return VisionTransformer(sizes)
