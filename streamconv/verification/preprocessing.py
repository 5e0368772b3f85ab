"""The preprocessing check: the saved image processor, and both models at its size, as in the original script.

The original conversion script compares the models at 224 pixels, where they differ by design: Meta's code
scales position embeddings by (n + 0.1) / 37, and transformers by n / 37. So the difference is measured with
both interpolations, and must vanish if both models use the same one.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from transformers import AutoImageProcessor

from streamconv.families.base import PixelSteps
from streamconv.verification.parity import Pair, compare, out_of_memory
from streamconv.verification.result import Check

PROVES_PIXELS = "the saved image processor produces the original's pixels"
PROVES = f"{PROVES_PIXELS}, and both models compute the same outputs from them"


def check_preprocessing(pair: Pair, folder: Path, pixel_steps: PixelSteps, image: Image.Image) -> Check:
    """Compare the pixels of ``folder``'s processor with torchvision's, then both models on these pixels."""
    try:
        wanted = original_pixels(image, pixel_steps)
        numbers, problems = _compare_pixels(folder, pixel_steps, image, wanted)
        verdict = compare(pair, wanted, "comparing at the image processor's size", is_native=False)
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory(pair.device, error) from error
    except Exception as error:  # transformers or torch rejects the output
        return Check("preprocessing", False, PROVES, (f"{type(error).__name__}: {error}",))
    size = wanted.shape[-1]
    numbers |= {"size": size, "tolerance": verdict.numbers["tolerance"]}
    for name, differences in (
        ("same_interpolation", verdict.judged.differences),
        ("as_published", verdict.as_published.differences if verdict.as_published else {}),
    ):
        numbers[name] = {state: differences[state] for state in ("cls", "patches", "logits") if state in differences}
    proves = f"{PROVES} at {size}x{size}, with the same interpolation of position embeddings{verdict.note}"
    return Check(
        "preprocessing", not problems and not verdict.problems, proves, (*problems, *verdict.problems), numbers
    )


def check_pixels(folder: Path, pixel_steps: PixelSteps, image: Image.Image) -> Check:
    """Compare only the pixels; no model runs."""
    try:
        wanted = original_pixels(image, pixel_steps)
        numbers, problems = _compare_pixels(folder, pixel_steps, image, wanted)
    except Exception as error:  # transformers or torch rejects the output
        return Check("preprocessing", False, PROVES_PIXELS, (f"{type(error).__name__}: {error}",))
    not_checked = f"no model ran at {wanted.shape[-1]}x{wanted.shape[-1]}"
    return Check("preprocessing", not problems, PROVES_PIXELS, tuple(problems), numbers, not_checked)


def original_pixels(image: Image.Image, pixel_steps: PixelSteps) -> Tensor:
    """Preprocess to (1, 3, H, W) with torchvision, as the original conversion script does."""
    steps = [
        transforms.Resize(pixel_steps.resize, interpolation=transforms.InterpolationMode.BICUBIC),
        *([transforms.CenterCrop(pixel_steps.crop)] if pixel_steps.crop else []),
        transforms.ToTensor(),
        transforms.Normalize(pixel_steps.mean, pixel_steps.std),
    ]
    return transforms.Compose(steps)(image).unsqueeze(0)  # type: ignore[no-any-return]


def _compare_pixels(
    folder: Path, pixel_steps: PixelSteps, image: Image.Image, wanted: Tensor
) -> tuple[dict[str, Any], list[str]]:
    """Compare the saved processor's pixels with ``wanted``; returns the numbers and the problems.

    With Pillow they must be equal. transformers' default may resize tensors instead, and is only reported.
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
