"""The preprocessing check: the pixels of the saved image processor against the same steps by torchvision.

The steps are those of the original's code or, if the image processor is the source's own or the user's, its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from transformers import AutoImageProcessor

from streamconv.families.image_processors import MAX_SIDE, PixelSteps, UnknownStepsError
from streamconv.planning.plan import Plan
from streamconv.verification.bands import RGB, to_bands
from streamconv.verification.machine import refuse_machine_failure
from streamconv.verification.pixels import crop, tensor_to_pixels, to_pixels
from streamconv.verification.result import Check

PROVES = "with Pillow, the saved image processor produces exactly the original's pixels"
ROUNDED = "the saved image processor produces the original's pixels, which the original rounds to whole grey levels"
OWN_STEPS = "with Pillow, it produces exactly the pixels of its own steps, computed by torchvision"
TENSOR_STEPS = "with tensors, it produces the pixels of its own steps, computed by torchvision"
_WHOSE = {
    "source": "the saved image processor is the source's own, unchanged",
    "beside": "the saved image processor has the steps that the config.json beside the weights states",
    "user": "the saved image processor is the one that was given",
    "edited": "the saved image processor was edited after the conversion",
}
# In grey levels. transformers' backend for tensors rescales and normalises in one step, unless it rescales first.
_ROUNDING, _ROUNDING_IN_ORDER = 0.01, 0.001
_ROUNDING_OF_BYTES = 1.1  # torch rounds after it has resized the rows, and again after the columns


def check_preprocessing(folder: Path, plan: Plan, image: Image.Image) -> Check:
    """Compare the pixels of ``folder``'s image processor with torchvision's."""
    aspect = plan.family.image_processor
    if aspect is None:
        return Check("preprocessing", None, f"{plan.family_name} models have no image processor")
    if plan.image_processor is None:
        why = f"none was written, since that of published {plan.family_name} models makes {RGB} channels"
        return Check("preprocessing", None, f"{why}, and this model takes {plan.channels}")
    try:
        steps = aspect.pixel_steps(plan.image_processor)
    except UnknownStepsError as error:
        return _check_loading(folder, plan, image, f"streamconv does not know {error}")
    if steps.mean and len(steps.mean) != plan.channels:
        return _check_loading(folder, plan, image, f"it normalises {len(steps.mean)} channels, not {plan.channels}")
    is_tensor = steps.rescales_first or plan.channels not in (1, RGB)  # which no class for Pillow's images does
    proves = _claim(plan, is_tensor)
    compare = _compare_tensors if is_tensor else _compare_images
    try:
        numbers, problems = compare(folder, plan, steps, image)
    except Exception as error:  # transformers or torch rejects the output
        refuse_machine_failure(error)
        return Check("preprocessing", False, proves, (f"{type(error).__name__}: {error}",))
    return Check("preprocessing", not problems, proves, tuple(problems), numbers)


def _claim(plan: Plan, is_tensor: bool) -> str:
    """Return what a passed check proves about the image processor."""
    if plan.image_processor_from in _WHOSE:
        return f"{_WHOSE[plan.image_processor_from]}; {TENSOR_STEPS if is_tensor else OWN_STEPS}"
    proves = ROUNDED if is_tensor else PROVES
    return proves if plan.is_published else f"{proves}, assuming the preprocessing of the published models"


def _check_loading(folder: Path, plan: Plan, image: Image.Image, why: str) -> Check:
    """Check only that transformers loads and runs the image processor, since ``why``."""
    not_checked = f"the image processor's pixels were not compared: {why}"
    proves = _WHOSE.get(plan.image_processor_from, "the image processor is as planned")
    if _has_number_above(MAX_SIDE, plan.image_processor):
        reason = f"{proves}, but was not run: it has a number above {MAX_SIDE:,}, and its images may be too large"
        return Check("preprocessing", None, reason, not_checked=not_checked)
    try:
        load: Any = AutoImageProcessor.from_pretrained
        pixels = load(folder, local_files_only=True)(image, return_tensors="pt")["pixel_values"]
    except Exception as error:
        refuse_machine_failure(error)
        if plan.image_processor_from != "source":
            return Check("preprocessing", False, proves, (f"{type(error).__name__}: {error}",))
        # It may need code that is not there, or other images.
        reason = f"{proves}, but transformers does not run it ({type(error).__name__}: {error})"
        return Check("preprocessing", None, reason, not_checked=not_checked)
    shape = " x ".join(map(str, pixels.shape[1:]))
    return Check("preprocessing", True, f"{proves}; it makes {shape} pixels", not_checked=not_checked)


def _has_number_above(limit: int, value: Any) -> bool:
    if isinstance(value, Mapping | list):
        return any(_has_number_above(limit, each) for each in (value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, int | float) and value > limit


def _compare_images(
    folder: Path, plan: Plan, steps: PixelSteps, image: Image.Image
) -> tuple[dict[str, Any], list[str]]:
    """Compare the saved processor's pixels of an image with torchvision's; returns the numbers and the problems.

    With Pillow, they must be equal. transformers' default may resize tensors instead; its difference is only reported.
    """
    is_own = plan.image_processor_from != "family"
    whose = "those of its steps" if is_own else "the original's"
    wanted = to_pixels(crop(image, steps, is_own=is_own), steps, plan.channels)
    given: Any = image if plan.channels == RGB else to_bands(image, plan.channels)
    load: Any = AutoImageProcessor.from_pretrained
    is_recent = int(transformers.__version__.partition(".")[0]) >= 5
    pillow = {"backend": "pil"} if is_recent else {"use_fast": False}
    exact, default = (load(folder, local_files_only=True, **backend) for backend in (pillow, {}))
    differences: list[float | None] = []
    problems = []
    for processor in (exact, default):
        pixels = processor(given, return_tensors="pt")["pixel_values"]
        if pixels.shape != wanted.shape:
            shapes = f"{list(pixels.shape)}, but {whose} {list(wanted.shape)}"
            problems.append(f"{type(processor).__name__} produces pixels of shape {shapes}")
            differences.append(None)
        else:
            differences.append(float((pixels - wanted).abs().max()))
    if differences[0]:
        problems.append(f"{type(exact).__name__}'s pixels differ from {whose} by {differences[0]:.3g}")
    numbers = {
        "pil": differences[0], "default": differences[1], "default_backend": type(default).__name__,
        "grey_level": _grey_level(steps),
    }  # fmt: skip
    return numbers, problems


def _compare_tensors(
    folder: Path, plan: Plan, steps: PixelSteps, image: Image.Image
) -> tuple[dict[str, Any], list[str]]:
    """Compare the pixels that the saved processor computes from a tensor, since images have up to four channels.

    A class that rescales first converts an image to a tensor itself. If the authors round to grey levels, the
    difference from their pixels, of up to about one level, is a separate number.
    """
    load: Any = AutoImageProcessor.from_pretrained
    processor = load(folder, local_files_only=True)
    bands = to_bands(image, plan.channels)
    pixels = processor(image if plan.channels == RGB else bands, return_tensors="pt")["pixel_values"]
    grey_level = _grey_level(steps)
    wanted = {"default": ("those of its steps", steps, _ROUNDING_IN_ORDER if steps.rescales_first else _ROUNDING)}
    aspect = plan.family.image_processor
    if plan.image_processor_from == "family" and aspect is not None and aspect.authors_round:
        wanted["rounded"] = ("the original's", replace(steps, rescales_first=False), _ROUNDING_OF_BYTES)
    numbers: dict[str, Any] = {"default_backend": type(processor).__name__, "grey_level": grey_level}
    problems = []
    for name, (whose, theirs, allowed) in wanted.items():
        expected = tensor_to_pixels(bands, theirs)
        if pixels.shape != expected.shape:
            shapes = f"{list(pixels.shape)}, but {whose} {list(expected.shape)}"
            return {}, [f"{type(processor).__name__} produces pixels of shape {shapes}"]
        numbers[name] = float((pixels - expected).abs().max())
        if not numbers[name] <= allowed * grey_level:
            problems.append(f"{type(processor).__name__}'s pixels differ from {whose} by {numbers[name]:.3g}")
    return numbers, problems


def _grey_level(steps: PixelSteps) -> float:
    """Return the size of the smallest step between two shades after normalisation."""
    return steps.scale / min(steps.std, default=1.0)
