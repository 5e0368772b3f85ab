"""Checks of the verification's options before hours of conversion, without importing torch into this process."""

import os
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path

from streamconv.errors import OutputError, UsageError
from streamconv.redaction import shown_argument

# What verification runs models with, by the names of the modules.
PACKAGES = {name: name for name in ("torch", "torchvision", "transformers", "accelerate")} | {"PIL": "Pillow"}

BUILTIN, HUB = "builtin", "hub"
URL_SCHEMES = ("http://", "https://")  # of images


def check_report(path: Path) -> None:
    """Check that a report can be written to ``path``.

    Raises:
        UsageError: the name does not end in .html.
        OutputError: the file cannot be written.
    """
    parent = path.absolute().parent
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"The report {path} must be an HTML file. Use --report FILE.html.")
    if os.path.isdir(path) or not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be written. Choose a --report file in a folder that exists and is writable.")


def check_packages() -> None:
    """Check that the packages for running models are installed, without importing them.

    Raises:
        UsageError: some are missing.
    """
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"Verification runs the models and needs {', '.join(missing)}, which this Python does not have. "
            f"Run `pip install {' '.join(missing)}`. Without them, `streamconv convert` converts, and `streamconv "
            "verify DIR` checks the files."
        )


def check_image(image: str | PathLike[str]) -> None:
    """Check that an image is a file, unless it is a URL. A pipe or a device may never end.

    Raises:
        UsageError: it is not.
    """
    if not fspath(image).lower().startswith(URL_SCHEMES) and not os.path.isfile(image):
        problem = "is not a file" if os.path.exists(image) else "does not exist"
        raise UsageError(f"The image {shown_argument(fspath(image))} {problem}.")


def check_reference(reference: str | PathLike[str]) -> None:
    """Check that a reference is "builtin", "hub" or a folder that torch.hub can load from.

    Raises:
        UsageError: it is none of them.
    """
    if reference not in (BUILTIN, HUB) and not os.path.exists(os.path.join(reference, "hubconf.py")):
        raise UsageError(f"The reference {reference} is not builtin, hub or a folder with a hubconf.py.")
