"""Images with as many channels as a model takes, made from one with three."""

from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

RGB = 3
_SHIFT = 5  # pixels


def to_bands(image: Image.Image, channels: int) -> Tensor:
    """Return the image as (C, H, W) of uint8.

    Beyond three channels, the colours repeat, each time shifted to the right, so that no two channels are the same and
    a model that confuses them computes something else.
    """
    colours: Tensor = functional.pil_to_tensor(image)
    if channels == RGB:
        return colours
    bands = colours.new_empty((channels, *colours.shape[1:]))
    for i in range(channels):
        bands[i] = colours[i % RGB].roll(_SHIFT * (i // RGB), dims=-1)
    return bands
