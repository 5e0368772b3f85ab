"""Reads the image processors of transformers: the steps by which a preprocessor_config.json makes pixels of an image.

Only processors are read whose steps are to resize, to crop the centre, to rescale and to normalise, or to rescale
before all others. Keys that a file lacks have the defaults of transformers' class, and sizes may be spelled in all ways
that transformers reads.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.display import printable

BICUBIC = 3  # Pillow's number
MAX_SIDE = 4_096  # pixels; verification makes images of this size, which take 200 MB each as float32
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_COMMON = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "crop_size": None,
    "rescale_factor": 1 / 255,
}
_SHORTEST = {
    **_COMMON,
    **_CLIP,
    "size": {"shortest_edge": 224},
    "crop_size": 224,
    "do_center_crop": True,
    "resample": 3,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "BitImageProcessor": _SHORTEST,
    "CLIPImageProcessor": _SHORTEST,
    "DINOv3ViTImageProcessor": {**_COMMON, **_IMAGENET, "size": {"height": 224, "width": 224}, "resample": 2},
    "DeiTImageProcessor": {**_COMMON, **_HALF, "size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3},
    "SiglipImageProcessor": {**_COMMON, **_HALF, "size": {"height": 224, "width": 224}, "resample": 3},
    "ViTImageProcessor": {**_COMMON, **_HALF, "size": 224, "resample": 2},
}
_SQUARE = (
    "DINOv3ViTImageProcessor",
    "DeiTImageProcessor",
    "ViTImageProcessor",
)  # a size that is one number is a square, not the shorter side
_RESCALING_FIRST = ("DINOv3ViTImageProcessor",)
_OTHER_STEPS = ("do_pad", "keep_aspect_ratio", "use_square_size")  # that change the pixels, if they are true


class UnknownStepsError(ValueError):
    """The steps of an image processor are not known; the message is a noun phrase that says which and why."""


@dataclass(frozen=True)
class PixelSteps:
    """The steps by which an image becomes pixels.

    ``resize`` is the length of the shorter side, or (height, width), None for the image's own size; ``resample`` is
    Pillow's number of the filter. ``crop`` is the (height, width) that is cut from the centre, None for no crop. Values
    from 0 to 255 are multiplied by ``scale``; then each channel is normalised by its ``mean`` and ``std``, unless these
    are empty. ``rescales_first``: the multiplication comes before the resizing, whose results are then not rounded to
    whole grey levels.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = BICUBIC
    scale: float = 1 / 255
    rescales_first: bool = False

    @property
    def size(self) -> tuple[int, int] | None:
        """The (height, width) of the pixels; None if it depends on the image."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)


def class_name(processor: Mapping[str, Any]) -> str:
    """Return the name of an image processor's class, without the suffix that names its backend; empty if unknown."""
    name = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    text = name if isinstance(name, str) else ""
    return text.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def read_pixel_steps(processor: Mapping[str, Any]) -> PixelSteps:
    """Return the steps that a preprocessor_config.json stands for.

    Raises:
        UnknownStepsError: they are not known.
    """
    name = class_name(processor)
    if name not in _DEFAULTS or "auto_map" in processor:
        raise UnknownStepsError(f"the steps of a {printable(name) or 'processor without a class'}")
    for key in _OTHER_STEPS:
        if processor.get(key):
            raise UnknownStepsError(f"the step {key} of its {name}")
    values = {**_DEFAULTS[name], **{key: value for key, value in processor.items() if value is not None}}
    mean, std = (_numbers(values, key) if values["do_normalize"] else () for key in ("image_mean", "image_std"))
    crop = _size(values, "crop_size", is_square=True) if values["do_center_crop"] else None
    if isinstance(crop, int) or len(mean) != len(std) or 0.0 in std:
        raise UnknownStepsError(f"the crop_size, image_mean and image_std of its {name} together")
    return PixelSteps(
        resize=_size(values, "size", is_square=name in _SQUARE) if values["do_resize"] else None,
        crop=crop,
        mean=mean,
        std=std,
        resample=_checked(values, "resample", lambda value: type(value) is int and 0 <= value <= 5),
        scale=float(_checked(values, "rescale_factor", _is_number)) if values["do_rescale"] else 1.0,
        rescales_first=name in _RESCALING_FIRST and bool(values["do_rescale"]),
    )


def _size(values: Mapping[str, Any], key: str, *, is_square: bool) -> int | tuple[int, int]:
    """Return the length of the shorter side, or (height, width)."""
    size = values[key]
    if isinstance(size, Mapping):
        keys = {each for each, value in size.items() if value is not None}
        found = [size[each] for each in ("height", "width") if each in keys] if len(keys) == 2 else []
        found = [size["shortest_edge"]] if keys == {"shortest_edge"} else found
    elif isinstance(size, list):
        found = size if len(size) == 2 else []
    else:
        found = [size, size] if is_square else [size]
    if not found or any(type(each) is not int or not 0 < each <= MAX_SIDE for each in found):
        raise _unknown(values, key)
    return found[0] if len(found) == 1 else (found[0], found[1])


def _numbers(values: Mapping[str, Any], key: str) -> tuple[float, ...]:
    found = _checked(values, key, lambda value: isinstance(value, list) and value and all(map(_is_number, value)))
    return tuple(map(float, found))


def _checked(values: Mapping[str, Any], key: str, is_valid: Callable[[Any], Any]) -> Any:
    if not is_valid(values[key]):
        raise _unknown(values, key)
    return values[key]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # False for NaN


def _unknown(values: Mapping[str, Any], key: str) -> UnknownStepsError:
    return UnknownStepsError(f"the {key} {printable(repr(values[key]))} of its {class_name(values)}")
