"""The preprocessing check: the saved image processor against the steps of the original's code, by torchvision."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from transformers import AutoImageProcessor

from streamconv.families.base import PixelSteps
from streamconv.verification.result import Check

PROVES = "with Pillow, the saved image processor produces exactly the original's pixels"


def check_preprocessing(folder: Path, pixel_steps: PixelSteps, image: Image.Image) -> Check:
    """Compare the pixels of ``folder``'s processor with torchvision's."""
    try:
        wanted = to_pixels(crop(image, pixel_steps), pixel_steps)
        numbers, problems = _compare_pixels(folder, pixel_steps, image, wanted)
    except Exception as error:  # transformers or torch rejects the output
        return Check("preprocessing", False, PROVES, (f"{type(error).__name__}: {error}",))
    return Check("preprocessing", not problems, PROVES, tuple(problems), numbers)


def crop(image: Image.Image, pixel_steps: PixelSteps) -> Image.Image:
    """Resize and crop with torchvision, as the original conversion script does."""
    steps = [
        transforms.Resize(pixel_steps.resize, interpolation=transforms.InterpolationMode.BICUBIC),
        *([transforms.CenterCrop(pixel_steps.crop)] if pixel_steps.crop else []),
    ]
    return transforms.Compose(steps)(image)  # type: ignore[no-any-return]


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resize to a square, such as the original's native size, at which positions need no interpolation."""
    return transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC)(image)  # type: ignore[no-any-return]


def to_pixels(image: Image.Image, pixel_steps: PixelSteps | None) -> Tensor:
    """Convert to (1, 3, H, W), normalized if the model has an image processor."""
    steps = [
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float32),  # ToTensor would compute in the caller's default dtype
        *([transforms.Normalize(pixel_steps.mean, pixel_steps.std)] if pixel_steps else []),
    ]
    return transforms.Compose(steps)(image).unsqueeze(0)  # type: ignore[no-any-return]


def _compare_pixels(
    folder: Path, pixel_steps: PixelSteps, image: Image.Image, wanted: Tensor
) -> tuple[dict[str, Any], list[str]]:
    """Compare the saved processor's pixels with ``wanted``; returns the numbers and the problems.

    With Pillow, they must be equal. transformers' default may resize tensors instead; its difference is only reported.
    """
    load: Any = AutoImageProcessor.from_pretrained
    exact, default = (load(folder, local_files_only=True, **backend) for backend in ({"backend": "pil"}, {}))
    grey_level = 1 / 255 / min(pixel_steps.std)
    differences: list[float | None] = []
    problems = []
    for processor in (exact, default):
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        if pixels.shape != wanted.shape:
            shapes = f"{list(pixels.shape)}, but the original {list(wanted.shape)}"
            problems.append(f"{type(processor).__name__} produces pixels of shape {shapes}")
            differences.append(None)
        else:
            differences.append(float((pixels - wanted).abs().max()))
    if differences[0]:
        problems.append(f"{type(exact).__name__}'s pixels differ from the original's by {differences[0]:.3g}")
    numbers = {
        "pil": differences[0], "default": differences[1], "default_backend": type(default).__name__,
        "grey_level": grey_level,
    }  # fmt: skip
    return numbers, problems
