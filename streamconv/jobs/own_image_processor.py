"""The image processor that the user gives: options and a file for a conversion, its record for a verification."""

from collections.abc import Sequence
from pathlib import Path

from streamconv.errors import SourceError, UsageError
from streamconv.files.address import Location
from streamconv.files.local import read_small
from streamconv.formats.limits import read_settings
from streamconv.jobs.options import ConversionOptions
from streamconv.output.manifest import Manifest
from streamconv.planning.image_processor import OwnImageProcessor


def own_image_processor(options: ConversionOptions, converted: Location | None) -> OwnImageProcessor | None:
    """Return the user's image processor: for a folder that was ``converted`` before, the one that it was given then.

    Raises:
        UsageError: the file cannot be read, or is not an image processor's.
    """
    if converted is not None:
        manifest = Manifest.read(converted)
        recorded = manifest.image_processor if manifest is not None else None
        return OwnImageProcessor(recorded.origin, config=recorded.config) if recorded is not None else None
    if options.image_processor is not None:
        return _read(Path(options.image_processor))
    mean, std, size = _numbers(options.image_mean), _numbers(options.image_std), options.image_size
    given = {"--image-mean": mean, "--image-std": std, "--image-size": size}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    origin = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return OwnImageProcessor(origin, mean=mean, std=std, size=size)


def _numbers(value: str | float | Sequence[float] | None) -> tuple[float, ...] | None:
    """Return what the options made of a mean or a standard deviation, which is a tuple."""
    return value if isinstance(value, tuple) else None


def _read(path: Path) -> OwnImageProcessor:
    try:
        config = read_settings(read_small(path), str(path))
    except SourceError as error:
        raise UsageError(f"The image processor cannot be read: {error}") from error
    has_class = "image_processor_type" in config or "feature_extractor_type" in config
    if not has_class and not any(key.startswith(("do_", "image_mean", "image_std")) for key in config):
        what = "a model's config.json" if "model_type" in config else "without the steps of an image processor"
        raise UsageError(f"{path} is {what}. Give a preprocessor_config.json.")
    return OwnImageProcessor(path.name, config=config)
