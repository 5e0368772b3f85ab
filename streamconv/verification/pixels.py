"""Preprocesses an image into the pixels for a model, step by step with torchvision."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional
from torchvision.transforms.v2 import functional as functional_v2

from streamconv.families.image_processors import PixelSteps
from streamconv.verification.bands import RGB, to_bands

# Pillow's numbers of filters.
_FILTERS = {
    0: functional.InterpolationMode.NEAREST,
    1: functional.InterpolationMode.LANCZOS,
    2: functional.InterpolationMode.BILINEAR,
    3: functional.InterpolationMode.BICUBIC,
    4: functional.InterpolationMode.BOX,
    5: functional.InterpolationMode.HAMMING,
}


def crop(image: Image.Image, steps: PixelSteps, *, is_own: bool = False) -> Image.Image:
    """Resize and crop with torchvision, as the original conversion script does.

    ``is_own``: the model has its own image processor, so an odd margin is divided as transformers does it.
    """
    if steps.resize is not None:
        image = functional.resize(image, _size(steps.resize), _FILTERS[steps.resample])
    if steps.crop is None:
        return image
    if not is_own:
        return functional.center_crop(image, [*steps.crop])  # type: ignore[no-any-return]
    height, width = steps.crop
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))  # beyond the image, pixels are black


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resize to a square, such as the original's native size, at which positions need no interpolation."""
    return functional.resize(image, [size, size], functional.InterpolationMode.BICUBIC)  # type: ignore[no-any-return]


def to_pixels(image: Image.Image, steps: PixelSteps | None, channels: int = RGB) -> Tensor:
    """Convert to (1, C, H, W), normalised if the steps of the image processor are known."""
    return _normalised(_rescaled(to_bands(image, channels), steps), steps).unsqueeze(0)


def tensor_to_pixels(bands: Tensor, steps: PixelSteps) -> Tensor:
    """Run all steps on an image as a tensor, (C, H, W) of uint8; returns (1, C, H, W).

    Tensors are resized with antialiasing; unless they are rescaled first, the results are rounded to whole grey levels.
    """
    values = _rescaled(bands, steps) if steps.rescales_first else bands
    if steps.resize is not None:
        # The first version of this function rounds bytes in another way.
        values = functional_v2.resize(values, _size(steps.resize), _FILTERS[steps.resample], antialias=True)
    if steps.crop is not None:
        (height, width), (rows, columns) = values.shape[1:], steps.crop
        values = functional.crop(values, (height - rows) // 2, (width - columns) // 2, rows, columns)
    values = values if steps.rescales_first else _rescaled(values, steps)
    return _normalised(values, steps).unsqueeze(0)


def _size(resize: int | tuple[int, int]) -> list[int]:
    return [resize] if isinstance(resize, int) else [*resize]


def _rescaled(bands: Tensor, steps: PixelSteps | None) -> Tensor:
    """Convert uint8 to float32, multiplied by the scale of the steps."""
    if steps is None or steps.scale == 1 / 255:
        converted: Any = functional.convert_image_dtype(bands, torch.float32)
        return converted  # type: ignore[no-any-return]
    return (bands.double() * steps.scale).float()


def _normalised(values: Tensor, steps: PixelSteps | None) -> Tensor:
    if steps is None or not steps.mean:
        return values
    return functional.normalize(values, [*steps.mean], [*steps.std])  # type: ignore[no-any-return]
