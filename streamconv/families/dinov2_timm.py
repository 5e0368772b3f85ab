"""DINOv2 in timm's layouts, and the facts in a config.json next to a file in its authors' or timm's names.

timm (https://github.com/huggingface/pytorch-image-models) publishes DINOv2 under names of its own, and so do authors of
models that are built on it. Its config.json names an architecture, ``model_args`` that override its sizes, and a
``pretrained_cfg`` with the preprocessing of images.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from streamconv.families.dinov2_geometry import REGISTER_KEYS, Dimensions
from streamconv.families.dinov2_models import MODELS, image_processor

# Hidden size, layers and heads of the architectures in timm's vision_transformer.py that such models are made from.
_SMALL, _BASE, _LARGE, _GIANT = (384, 12, 6), (768, 12, 12), (1024, 24, 16), (1536, 40, 24)
ARCHITECTURES = {
    "vit_small_patch14_dinov2": _SMALL,
    "vit_small_patch14_reg4_dinov2": _SMALL,
    "vit_small_patch16_224": _SMALL,
    "vit_base_patch14_dinov2": _BASE,
    "vit_base_patch14_reg4_dinov2": _BASE,
    "vit_base_patch16_224": _BASE,
    "vit_large_patch14_dinov2": _LARGE,
    "vit_large_patch14_reg4_dinov2": _LARGE,
    "vit_large_patch14_224": _LARGE,
    "vit_large_patch16_224": _LARGE,
    "vit_giant_patch14_dinov2": _GIANT,
    "vit_giant_patch14_reg4_dinov2": _GIANT,
    "vit_base_patch14_reg1_tipsv2": _BASE,
    "vit_large_patch14_reg1_tipsv2": _LARGE,
    "vit_giant_patch14_reg1_tipsv2": _GIANT,
    "vit_huge_patch14_224": (1280, 32, 16),
    "vit_giant_patch14_224": (1408, 40, 16),
    "vit_gigantic_patch14_224": (1664, 48, 16),
}
_ENTRIES = ("embed_dim", "depth", "num_heads")
DEFAULT_CROP = 0.875  # the cropped share of the resized image in timm, if pretrained_cfg has no crop_pct
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers
_MAX_SIDE = 4096


def differences(sizes: Dimensions) -> list[str]:
    """Describe how the source's layout differs from the authors', and what is written instead."""
    found = {
        "reg_token holds the registers": sizes.register_key == REGISTER_KEYS[1],
        "pos_embed has no row for the CLS token, so a row of zeros is written, which has no effect":
            not sizes.embedded_tokens,
        "the position embeddings of the registers are added to them": sizes.embedded_tokens > 1,
        "mlp.fc1 and mlp.fc2 are the w12 and w3 of a SwiGLU": sizes.is_packed,
    }  # fmt: skip
    return [difference for difference, is_there in found.items() if is_there]


def assumptions(sizes: Dimensions) -> tuple[str, ...]:
    """Return assumptions about tensors in timm's layout that no published model of this hidden size confirms."""
    is_published = any(model.dimensions.swiglu and model.dimensions.hidden == sizes.hidden for model in MODELS)
    if not sizes.is_packed or is_published:
        return ()
    return ("mlp.fc1 is assumed to be that of timm's SwiGLUPacked: SiLU of its first half times the second half",)


def heads_beside(config: Mapping[str, Any], sizes: Dimensions) -> int | None:
    """Return the number of heads in a config.json of transformers or timm, if it has this hidden size and depth."""
    for entries, keys in (
        (config, ("hidden_size", "num_hidden_layers", "num_attention_heads")),
        (_model_args(config), _ENTRIES),
    ):
        hidden, layers, heads = map(entries.get, keys)
        if (hidden, layers) == (sizes.hidden, sizes.layers) and type(heads) is int and heads > 0:
            return heads
    return None


def image_processor_beside(config: Mapping[str, Any], sizes: Dimensions) -> Mapping[str, Any] | None:
    """Return an image processor with the steps that a config.json of timm states for the evaluation of this model.

    Returns:
        None if the config is not timm's, describes a model of another size, or states steps that are not known.
    """
    steps, args = config.get("pretrained_cfg"), _model_args(config)
    if not isinstance(steps, Mapping) or (args.get("embed_dim"), args.get("depth")) != (sizes.hidden, sizes.layers):
        return None
    mean, std = steps.get("mean"), steps.get("std")
    if not _is_numbers(mean, 3) or not _is_numbers(std, 3) or min(std) <= 0 or sizes.channels != 3:
        return None
    size, crop = steps.get("input_size") or [3, 224, 224], steps.get("crop_pct") or DEFAULT_CROP
    resample = _FILTERS.get(str(steps.get("interpolation") or "bicubic"))
    if resample is None or (steps.get("crop_mode") or "center") != "center" or not _is_numbers([crop], 1):
        return None
    if not isinstance(size, list) or len(size) != 3 or size[1] != size[2] or type(size[1]) is not int:
        return None
    if not 0 < size[1] <= _MAX_SIDE:  # before it is divided, which a number of hundreds of digits cannot be
        return None
    resized = math.floor(size[1] / crop) if crop > 0.01 else 0
    if not size[1] <= resized <= _MAX_SIDE:
        return None
    return {**image_processor(resized, size[1]), "image_mean": [*mean], "image_std": [*std], "resample": resample}


def _model_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes in a config.json of timm: those of the architecture, and arguments that override them."""
    architecture, args = config.get("architecture"), config.get("model_args")
    known = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    return {**dict(zip(_ENTRIES, known or (), strict=False)), **(args if isinstance(args, Mapping) else {})}


def _is_numbers(value: Any, count: int) -> TypeGuard[list[float]]:
    is_list = isinstance(value, list) and len(value) == count
    return is_list and all(type(each) in (int, float) and abs(each) <= 10 for each in value)
