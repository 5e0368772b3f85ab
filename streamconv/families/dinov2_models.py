"""The published DINOv2 and Web-DINO models."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from streamconv.families.base import Model, RemoteFile
from streamconv.families.dinov2_geometry import Dimensions, ffn_size


def image_processor(resized: int, size: int) -> dict[str, Any]:
    """Return a config that resizes the shorter side to ``resized`` pixels, and crops to ``size`` by ``size``."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": resized},
    }


IMAGE_PROCESSOR = image_processor(256, 224)  # as published, although the models' own image size is 518


def _dinov2() -> tuple[Model, ...]:
    models = []
    for letter, word, hidden, layers, swiglu in (
        ("s", "small", 384, 12, False),
        ("b", "base", 768, 12, False),
        ("l", "large", 1024, 24, False),
        ("g", "giant", 1536, 40, True),
    ):
        plain = f"dinov2_vit{letter}14"
        address = f"https://dl.fbaipublicfiles.com/dinov2/{plain}/"  # of the files with registers, too
        for name, file, published, registers in (
            (plain, plain, f"dinov2-{word}", 0),
            (f"{plain}_reg", f"{plain}_reg4", f"dinov2-with-registers-{word}", 4),
        ):
            sizes = Dimensions(hidden, layers, ffn_size(hidden, 4, swiglu), swiglu, registers=registers)
            backbone, head = (
                RemoteFile(each, address + each) for each in (f"{file}_pretrain.pth", f"{file}_linear_head.pth")
            )
            classifier = replace(sizes, classes=1000)
            classifier_name = f"{published}-imagenet1k-1-layer"
            models += [
                Model(name, published, sizes, "apache-2.0", backbone, IMAGE_PROCESSOR),
                Model(f"{name}_1layer", classifier_name, classifier, "apache-2.0", backbone, IMAGE_PROCESSOR, head),
            ]
    return tuple(sorted(models, key=lambda model: (model.dimensions.registers, model.head is not None)))


def _web_dino() -> Iterator[Model]:
    for size, data, hidden, layers in (
        ("300m", "full2b", 1024, 24),
        ("1b", "full2b", 1536, 40),
        ("2b", "full2b", 2688, 24),
        ("2b", "light2b", 2688, 24),
        ("2b", "heavy2b", 2688, 24),
        ("3b", "full2b", 3072, 26),
        ("3b", "light2b", 3072, 26),
        ("3b", "heavy2b", 3072, 26),
        ("5b", "full2b", 3584, 32),
        ("7b", "full8b", 4096, 32),
    ):
        for pixels in (224, 378, 518) if size == "7b" else (224,):
            name = f"webssl_dino{size}_{data}_{pixels}"
            yield Model(
                name,
                name.replace("_", "-"),
                Dimensions(hidden, layers, ffn_size(hidden, 4, True), True, positions=(pixels // 14) ** 2 + 1),
                "cc-by-nc-4.0",
                RemoteFile(f"{name}.pth", f"https://dl.fbaipublicfiles.com/webssl/{name}.pth"),
                image_processor(pixels, pixels),
                block_chunks=4,
            )


MODELS = (*_dinov2(), *_web_dino())
