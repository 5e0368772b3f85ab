"""A tiny ConvNeXt of DINOv3 with random weights, as Meta's code saves it."""

import math

import torch

from streamconv.families.dinov3_convnext import FAMILY, Dimensions

TINY = Dimensions(depths=(1, 2, 3, 1), widths=(8, 16, 24, 32))
State = dict[str, torch.Tensor]


def convnext_state(sizes: Dimensions = TINY, seed: int = 0) -> State:
    """Return a state dict in which norms.3 is the storage of norm."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, info in FAMILY.sources(sizes).items():
        scale = 0.3 if len(info.shape) == 1 else math.prod(info.shape[1:]) ** -0.5
        state[name] = torch.randn(info.shape, generator=generator) * scale
    for part in ("weight", "bias"):
        if sizes.has_norms:
            state[f"norms.3.{part}"] = state[f"norm.{part}"]
    return state
