"""Facts that all DINOv3 models share: addresses, licence, image processor, and heads in training checkpoints."""

from typing import Any

from streamconv.families.aspects import ExtraPrefix, ImageProcessor
from streamconv.families.base import RemoteFile

LICENCE = "dinov3-license"
LICENCE_LINK = "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
ORGANISATION = "facebook"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SATELLITE_MEAN, SATELLITE_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)  # of SAT-493M, in the authors' README
SATELLITE_NOTE = (
    "preprocessor_config.json: image_mean and image_std are those of the authors for satellite images "
    "(0.430, 0.411, 0.296 and 0.213, 0.156, 0.143); transformers' conversion script writes ImageNet's"
)


def image_processor(mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> dict[str, Any]:
    """Return a config that resizes to a square of 224 pixels.

    transformers 5 calls the class DINOv3ViTImageProcessor, but reads this name, too, which 4.56 and 4.57 need.
    """
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [*mean],
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "image_std": [*std],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224},
    }


IMAGE_PROCESSOR = ImageProcessor(image_processor(), authors_round=True)


def published_file(architecture: str, data: str, digest: str) -> RemoteFile:
    """Return the published file of a model trained on ``data``. ``digest`` is the first 8 digits of its sha256."""
    filename = f"dinov3_{architecture}_pretrain_{data}-{digest}.pth"
    return RemoteFile(filename, f"https://dl.fbaipublicfiles.com/dinov3/dinov3_{architecture}/{filename}")


# DINO and iBOT train the backbone with a projection after it, in a student's or a teacher's checkpoint.
_TRAINING_HEAD = "a head for training only, which no transformers class has"
EXTRA_PREFIXES = (
    ExtraPrefix("dino_head.", _TRAINING_HEAD),
    ExtraPrefix("ibot_head.", _TRAINING_HEAD),
    ExtraPrefix("optimizer.", "optimizer state"),
)
