"""Layers that several of the authors' vision transformers have, with the parameters' names of Meta's code."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int, has_bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(hidden, width, bias=has_bias)
        self.fc2 = nn.Linear(width, hidden, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a norm before it, a scale after it, and a residual connection."""

    def __init__(self, hidden: int, epsilon: float, attention: nn.Module, mlp: nn.Module, has_layer_scale: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, eps=epsilon)
        self.attn = attention
        self.ls1 = LayerScale(hidden) if has_layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(hidden, eps=epsilon)
        self.mlp = mlp
        self.ls2 = LayerScale(hidden) if has_layer_scale else nn.Identity()

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        """Return tokens, (B, T, D). ``others`` are passed on to the attention, such as the angles of RoPE."""
        x = x + self.ls1(self.attn(self.norm1(x), *others))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]
