"""The device that a verification runs on, and the versions that it ran with.

As a program, ``python -m streamconv.verify.devices DEVICE [IMAGE]`` says whether both exist: the
command line asks it before a conversion, in a process of its own, so that the conversion's stays
free of torch.
"""

import sys

import accelerate
import torch
import torchvision
import transformers

from streamconv._version import __version__
from streamconv.errors import UsageError
from streamconv.verify.image import open_image


def choose_device(name: str) -> torch.device:
    """The device that ``name`` means; "auto" takes a GPU where there is one. TF32 is switched off.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is no device. Use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda") or name.startswith("cpu:"):
        raise UsageError(f"{name!r} is no device that streamconv verifies on. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"{name} was asked for, and torch finds no CUDA GPU here. Use --device cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"{name} was asked for, and there are {torch.cuda.device_count()} GPUs, from cuda:0 on.")
        # TF32 keeps 10 bits of a product's mantissa: it would drown what is looked for.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return device


def versions() -> dict[str, str]:
    packages = (torch, torchvision, transformers, accelerate)
    return {"streamconv": __version__, **{package.__name__: package.__version__ for package in packages}}


if __name__ == "__main__":
    try:
        choose_device(sys.argv[1])
        open_image(sys.argv[2] if len(sys.argv) > 2 else None)
    except UsageError as error:
        sys.exit(str(error))
