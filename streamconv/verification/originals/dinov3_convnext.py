"""DINOv3's ConvNeXt for inference, after Meta's dinov3/models/convnext.py.

Parameters and attributes have Meta's names, and operations Meta's order. So its files load strictly, the results are
equal bit for bit, and `states` can run Meta's code as well as this one. Training and masks are omitted.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamconv.families.base import Model
from streamconv.families.dinov3_convnext import Dimensions
from streamconv.verification.originals import OriginalArchitecture, first_module_list
from streamconv.verification.originals.hub import load_without_weights, require_model

REPOSITORY = "facebookresearch/dinov3"


class ChannelNorm(nn.Module):
    """A layer norm over the channels of (B, C, H, W), which Meta's code computes step by step."""

    def __init__(self, channels: int, epsilon: float):
        super().__init__()
        self.eps = epsilon
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        variance = centred.pow(2).mean(1, keepdim=True)
        x = centred / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Block(nn.Module):
    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        inner = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(inner)))
        return x + inner.permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class ConvNeXt(nn.Module):
    """Four stages of blocks. The mean of the patches serves as the CLS token, and is normalised with them."""

    def __init__(self, sizes: Dimensions):
        super().__init__()
        epsilon, first = sizes.epsilon, sizes.widths[0]
        stem = nn.Sequential(nn.Conv2d(sizes.channels, first, 4, stride=4), ChannelNorm(first, epsilon))
        others = (
            nn.Sequential(ChannelNorm(before, epsilon), nn.Conv2d(before, after, 2, stride=2))
            for before, after in pairwise(sizes.widths)
        )
        self.downsample_layers = nn.ModuleList([stem, *others])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, epsilon) for _ in range(depth)))
            for width, depth in zip(sizes.widths, sizes.depths, strict=True)
        )
        self.norm = nn.LayerNorm(sizes.widths[-1], eps=epsilon)
        if sizes.has_norms:  # a second name of the same norm
            self.norms = nn.ModuleList([*(nn.Identity() for _ in sizes.depths[1:]), self.norm])


def build(sizes: Dimensions) -> ConvNeXt:
    return ConvNeXt(sizes)


def load(repository: str, source: str, model: Model) -> Any:
    """Load Meta's own model. Runs the repository's code."""
    return require_model(load_without_weights(repository, model.name, source), "downsample_layers")


def states(model: Any, pixels: Tensor, as_transformers: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Run Meta's model or ours on ``pixels``, (B, C, H, W), and yield each block's output by name.

    Yields "embeddings", the stem's output; "layer 0", "layer 1", …, which count the blocks of all stages, (B, C, H, W)
    each; and after the last norm "cls" (B, 1, D) and "patches" (B, P, D).
    """
    x, layer = pixels, 0
    for i, (downsample, stage) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
        x = downsample(x)
        if i == 0:
            yield "embeddings", x
        for block in stage:
            x = block(x)
            yield f"layer {layer}", x
            layer += 1
    pooled = x.mean([-2, -1])
    x = model.norm(torch.cat([pooled.unsqueeze(1), torch.flatten(x, 2).transpose(1, 2)], dim=1))
    yield "cls", x[:, :1]
    yield "patches", x[:, 1:]


def layers(model: Any) -> list[Any]:
    """Return the blocks of all stages of transformers' model."""
    return [block for stage in first_module_list(model) for block in stage.layers]


ARCHITECTURE = OriginalArchitecture(
    repository=REPOSITORY,
    build=build,
    load=load,
    states=states,
    prefix_tokens=lambda sizes: {"cls": 1},
    layers=layers,
)
