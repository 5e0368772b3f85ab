"""Pictures of what the models compute: the first three principal components of the patch features as red, green, blue.

They let a person see at a glance that both models see the same; the parity check is what proves it.
"""

import base64
import io
import math

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

IMAGE_SIZE = 518
ITERATIONS = 10


def draw_pictures(image: Image.Image, original: Tensor, converted: Tensor) -> dict[str, str]:
    """Draw PNGs as data URLs: the "image" that both models saw, and "original" and "converted", one pixel per patch.

    ``original`` and ``converted`` are patch features, (1, N, D) with N a square. Both are drawn with
    the original's components and colour range, so that a visible difference is a real one. There is no
    picture of features if the original's are not finite.
    """
    pictures = {"image": _data_url(image.resize((IMAGE_SIZE, IMAGE_SIZE)))}
    side, largest = math.isqrt(original.shape[1]), original.abs().max()
    if side < 2 or not original.isfinite().all() or not largest:
        return pictures  # no principal components exist
    first, second = ((features[0] / largest).cpu().float().nan_to_num() for features in (original, converted))
    center = first.mean(dim=0)
    components = principal_components(first - center)
    low, high = torch.quantile((first - center) @ components, torch.tensor([0.01, 0.99], dtype=torch.float32), dim=0)
    for name, features in (("original", first), ("converted", second)):
        colours = ((features - center) @ components - low) / (high - low).clamp_min(1e-12)
        colours = colours.clamp(0, 1).T.reshape(3, side, side)
        pictures[name] = _data_url(functional.to_pil_image(colours))
    return pictures


def principal_components(centred: Tensor) -> Tensor:
    """Return the first three principal components of (N, D) features with the mean 0, as (D, 3).

    This is a subspace iteration, like `torch.pca_lowrank`, which draws from the random numbers of the whole process.
    """
    generator = torch.Generator().manual_seed(0)
    components = torch.randn(centred.shape[1], 3, generator=generator, dtype=centred.dtype)
    for _ in range(ITERATIONS):
        components, _ = torch.linalg.qr(centred.T @ (centred @ components))
    return components


def _data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
