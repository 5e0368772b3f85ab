"""The published DINOv3 vision transformers."""

from collections.abc import Iterator

from streamconv.families.base import Model
from streamconv.families.dinov3_geometry import Dimensions
from streamconv.families.dinov3_release import (
    LICENCE,
    LICENCE_LINK,
    SATELLITE_MEAN,
    SATELLITE_NOTE,
    SATELLITE_STD,
    image_processor,
    published_file,
)

WEB, SATELLITE = "lvd1689m", "sat493m"  # the images that they were trained on


def _models() -> Iterator[Model]:
    for size, hidden, layers, ffn, digests in (
        ("s16", 384, 12, 1536, {WEB: "08c60483"}),
        ("s16plus", 384, 12, 1536, {WEB: "4057cbaa"}),
        ("b16", 768, 12, 3072, {WEB: "73cec8be"}),
        ("l16", 1024, 24, 4096, {WEB: "8aa4cbdd", SATELLITE: "eadcf0ff"}),
        ("l16plus", 1024, 24, 4096, {WEB: "46503df0"}),  # the only one that transformers' script does not convert
        ("h16plus", 1280, 32, 5120, {WEB: "7c1da9a5"}),
        ("7b16", 4096, 40, 8192, {WEB: "a955f4ea", SATELLITE: "a6675841"}),
    ):
        is_7b = size == "7b16"
        for data, digest in digests.items():
            is_satellite = data == SATELLITE
            yield Model(
                f"dinov3_vit{size}_{data}" if is_satellite else f"dinov3_vit{size}",
                f"dinov3-vit{size}-pretrain-{data}",
                Dimensions(
                    hidden,
                    layers,
                    ffn,
                    is_gated=is_7b or size.endswith("plus"),
                    has_bias=not is_7b,
                    head_size=128 if is_7b else 64,
                    has_local_norm=is_7b or is_satellite,
                    mask="" if is_7b else "keys",
                ),
                LICENCE,
                published_file(f"vit{size}", data, digest),
                image_processor(SATELLITE_MEAN, SATELLITE_STD) if is_satellite else image_processor(),
                licence_link=LICENCE_LINK,
                image_processor_note=SATELLITE_NOTE if is_satellite else "",
            )


MODELS = tuple(_models())
