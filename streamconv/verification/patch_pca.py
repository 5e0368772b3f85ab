"""What the models see, to look at: a picture's patch features, their three main components as red, green and blue."""

import base64
import io
import math

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

IMAGE_SIZE = 518


def draw_pictures(image: Image.Image, original: Tensor, converted: Tensor) -> dict[str, str]:
    """PNGs as data addresses: the "image" as both models saw it, and a pixel per patch for each of them.

    ``original`` and ``converted`` are patch features, (1, N, D) with N a square. Both are shown in
    the original's components and colours, so that what looks different is different. Features that
    are not finite have no picture.
    """
    pictures = {"image": _address(image.resize((IMAGE_SIZE, IMAGE_SIZE)))}
    side, largest = math.isqrt(original.shape[1]), original.abs().max()
    if side < 2 or not original.isfinite().all() or not largest:
        return pictures  # features that have no components
    first, second = ((features[0] / largest).cpu().float().nan_to_num() for features in (original, converted))
    center = first.mean(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # pca_lowrank starts from random vectors
        _, _, components = torch.pca_lowrank(first, q=3)
    low, high = torch.quantile((first - center) @ components, torch.tensor([0.01, 0.99]), dim=0)
    for name, features in (("original", first), ("converted", second)):
        colours = ((features - center) @ components - low) / (high - low).clamp_min(1e-12)
        colours = colours.clamp(0, 1).T.reshape(3, side, side)
        pictures[name] = _address(functional.to_pil_image(colours))
    return pictures


def _address(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
