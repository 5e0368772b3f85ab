"""The layers of DINOv2, after Meta's dinov2/layers/, with the parameters' names of Meta or timm."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamconv.families.dinov2_geometry import Dimensions


class Attention(nn.Module):
    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.heads = sizes.num_heads
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=sizes.has_qkv_bias)
        self.proj = nn.Linear(sizes.hidden, sizes.hidden, bias=sizes.has_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        # (B, T, 3, heads, size) to three tensors (B, heads, T, size)
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, hidden))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int, has_bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(hidden, width, bias=has_bias)
        self.fc2 = nn.Linear(width, hidden, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class SwiGlu(nn.Module):
    def __init__(self, hidden: int, width: int, has_bias: bool):
        super().__init__()
        self.w12 = nn.Linear(hidden, 2 * width, bias=has_bias)
        self.w3 = nn.Linear(width, hidden, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)  # type: ignore[no-any-return]


class PackedSwiGlu(nn.Module):
    """timm's SwiGLUPacked: the first half of fc1 is the gate, as in `SwiGlu`."""

    def __init__(self, hidden: int, width: int, has_bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(hidden, 2 * width, bias=has_bias)
        self.fc2 = nn.Linear(width, hidden, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(functional.silu(gate) * value)  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.hidden, eps=sizes.epsilon)
        self.attn = Attention(sizes)
        self.ls1 = LayerScale(sizes.hidden) if sizes.has_layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(sizes.hidden, eps=sizes.epsilon)
        kind = PackedSwiGlu if sizes.is_packed else SwiGlu if sizes.swiglu else Mlp
        self.mlp = kind(sizes.hidden, sizes.ffn, sizes.has_ffn_bias)
        self.ls2 = LayerScale(sizes.hidden) if sizes.has_layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.proj = nn.Conv2d(sizes.channels, sizes.hidden, sizes.patch, stride=sizes.patch, bias=sizes.has_patch_bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]
