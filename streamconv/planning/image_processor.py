"""Chooses the image processor of an output: the user's, the source's own, or that of published models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.arguments import shown_value
from streamconv.errors import UsageError
from streamconv.families.base import ConversionSpec, Family, Model
from streamconv.families.image_processors import UnknownStepsError, class_name
from streamconv.families.selection import Selection
from streamconv.planning.plan import CONFIG_NAME, IMAGE_PROCESSOR_NAME, Origin

MAX_CHANNEL_NUMBER = 10  # of a mean or standard deviation of values from 0 to 1


@dataclass(frozen=True)
class OwnImageProcessor:
    """The image processor that the user gave: a whole ``config``, or entries that replace those of another one.

    ``mean`` and ``std`` have one number per channel, or one for all. ``size`` is the height and width of the pixels:
    the image's shorter side is resized to it, and the centre is cut out. ``origin`` names the options or the file.
    """

    origin: str
    config: Mapping[str, Any] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None


@dataclass(frozen=True)
class ChosenImageProcessor:
    """An image processor's config, None if none is written, whose it is, and what the output notes about it.

    ``file`` is the bytes of the source's file if that is kept, to be written as they are.
    """

    config: Mapping[str, Any] | None
    origin: Origin = "family"
    notes: tuple[str, ...] = ()
    file: bytes = b""


def parse_channel_numbers(name: str, value: str | float | Sequence[float]) -> tuple[float, ...]:
    """Return a mean or a standard deviation as numbers, one per channel or one for all.

    Args:
        name: "image_mean" or "image_std".
        value: A number, several, or a text with commas between them.

    Raises:
        UsageError: it is none of these, or does not suit values from 0 to 1.
    """
    shown = f"--{name.replace('_', '-')} {shown_value(value)}"
    given: Sequence[Any] = (
        value.split(",") if isinstance(value, str) else ([*value] if isinstance(value, Sequence) else [value])
    )
    try:
        numbers = tuple(float(each) for each in given)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UsageError(f"{shown} is not a list of numbers. Give one per channel, such as 0.5,0.5,0.5.")
    if max(map(abs, numbers)) > MAX_CHANNEL_NUMBER:
        raise UsageError(f"{shown} is not for values from 0 to 1. If it is for 0 to 255, divide it by 255.")
    if name == "image_std" and min(numbers) <= 0:
        raise UsageError(f"{shown} has a number that is not above 0, and each channel is divided by one.")
    return numbers


def choose_image_processor(
    family: Family,
    candidates: Sequence[Model],
    selection: Selection,
    spec: ConversionSpec,
    own: OwnImageProcessor | None,
    *,
    is_published: bool,
) -> ChosenImageProcessor:
    """Choose the user's image processor, or else the source's, or else that of the published models.

    Raises:
        UsageError: the user's does not suit the model.
    """
    if family.image_processor is None:
        if own is not None:
            raise UsageError(f"A {family.name} model has no image processor. Omit {own.origin}.")
        return ChosenImageProcessor(None)
    channels = spec.config.get("num_channels", 3)
    base = selection.image_processor
    if own is not None:
        return _users(own, family, selection, candidates, spec)
    if base is not None:
        if not selection.image_processor_file:
            note = f"{IMAGE_PROCESSOR_NAME}: as the {CONFIG_NAME} beside the weights states"
            return ChosenImageProcessor(base, "beside", (note,))
        note = f"{IMAGE_PROCESSOR_NAME}: kept from the source, unchanged"
        return ChosenImageProcessor(base, "source", (note,), selection.image_processor_file)
    if channels != 3:
        count = "1 channel" if channels == 1 else f"{channels} channels"
        note = (
            f"no {IMAGE_PROCESSOR_NAME} is written: the model takes {count}, and the image processor of published "
            f"{family.name} models makes 3 (--image-mean and --image-std, or --image-processor)"
        )
        return ChosenImageProcessor(None, notes=(note,))
    config = _published(family, candidates)
    note = "" if is_published else _published_note(family, config, selection, spec) + _others_note(config, candidates)
    own_note = candidates[0].image_processor_note if candidates else ""
    return ChosenImageProcessor(config, notes=tuple(filter(None, (note, own_note))))


def _published(family: Family, candidates: Sequence[Model]) -> Mapping[str, Any]:
    assert family.image_processor is not None
    return (candidates[0].image_processor if candidates else None) or family.image_processor.default


def _published_note(family: Family, config: Mapping[str, Any], selection: Selection, spec: ConversionSpec) -> str:
    assert family.image_processor is not None
    size, trained = family.image_processor.pixel_steps(config).size, spec.config["image_size"]
    makes = f" ({size[1]} x {size[0]} pixels)" if size is not None else ""
    native = f"; the model's native size is {trained}" if size is not None and size != (trained, trained) else ""
    why = "the source has none" if selection.is_converted else "tensors do not show how images were prepared"
    return f"{IMAGE_PROCESSOR_NAME}: that of published {family.name} models{makes}, since {why}{native}"


def _others_note(config: Mapping[str, Any], candidates: Sequence[Model]) -> str:
    """Name the published models of the same shapes that have another image processor."""
    names = [model.name for model in candidates if model.image_processor != config]
    return f"; {' and '.join(names)} of the same shapes has another" if names else ""


def _users(
    own: OwnImageProcessor, family: Family, selection: Selection, candidates: Sequence[Model], spec: ConversionSpec
) -> ChosenImageProcessor:
    """Return the user's config, or the source's or the published one with the entries that the user gave."""
    channels = spec.config.get("num_channels", 3)
    if own.config is not None:
        _require_channels(own.config, channels, f"{own.origin}: its")
        return ChosenImageProcessor(own.config, "user", (f"{IMAGE_PROCESSOR_NAME}: from {own.origin}",))
    config = {**(selection.image_processor or _published(family, candidates))}
    for key, numbers in (("image_mean", own.mean), ("image_std", own.std)):
        if numbers is not None:
            config |= {key: [*numbers] * (channels if len(numbers) == 1 else 1), "do_normalize": True}
    _require_channels(config, channels, "The image processor's")
    if channels != 3:
        # Only the torchvision backend, whose classes transformers 4 calls Fast, takes images of other channels.
        config |= {"image_processor_type": f"{class_name(config)}Fast", "do_convert_rgb": False}
        config |= {} if channels == 1 else {"input_data_format": "channels_first"}
    resized = ""
    if own.size is not None:
        entries, resized = _sized(own.size, family, config, spec)
        config |= entries
    rest = "the source" if selection.image_processor is not None else f"published {family.name} models"
    note = f"{IMAGE_PROCESSOR_NAME}: {own.origin} as given{resized}; the rest is that of {rest}"
    return ChosenImageProcessor(config, "user", (note,))


def _sized(size: int, family: Family, config: Mapping[str, Any], spec: ConversionSpec) -> tuple[dict[str, Any], str]:
    """Return the entries of a config that makes pixels of this size, and their description."""
    assert family.image_processor is not None
    patch = spec.config.get("patch_size")
    if patch and size % patch:
        raise UsageError(f"--image-size {size} does not divide into the model's patches. Give a multiple of {patch}.")
    try:
        steps = family.image_processor.pixel_steps(config)
    except UnknownStepsError as error:
        raise UsageError(
            f"--image-size cannot replace {error}, which streamconv does not know. Give the whole file with "
            "--image-processor."
        ) from None
    pixels = {"height": size, "width": size}
    if steps.crop is None:
        return {"do_resize": True, "size": pixels}, f" (images are resized to {size} x {size})"
    entries = {"do_resize": True, "size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": pixels}
    return entries, f" (the shorter side is resized to {size}, and {size} x {size} pixels are cut from the centre)"


def _require_channels(config: Mapping[str, Any], channels: int, whose: str) -> None:
    """Refuse numbers that are not one per channel; a file without them leaves them to transformers."""
    for key in ("image_mean", "image_std"):
        numbers = config.get(key)
        if isinstance(numbers, list) and len(numbers) != channels:
            count = "1 channel" if channels == 1 else f"{channels} channels"
            raise UsageError(
                f"{whose} {key} has {len(numbers)} numbers, but the model takes {count}. "
                f"Give --image-mean and --image-std with {channels} each, or one for all."
            )
