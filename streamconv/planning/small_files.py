"""Decides the small files of an output: config.json and the image processor's file."""

from collections.abc import Mapping, Sequence
from typing import Any

from streamconv.errors import UsageError
from streamconv.families.base import ConversionSpec, Family, Model
from streamconv.families.selection import Selection
from streamconv.planning.plan import CONFIG_NAME, label_config
from streamconv.planning.shards import to_json
from streamconv.tensors.info import DTYPES

IMAGE_PROCESSOR_NAME = "preprocessor_config.json"


def make_config(spec: ConversionSpec, family: Family, dtype: str, labels: Sequence[str] | None) -> dict[str, Any]:
    """Return config.json."""
    config = {"architectures": [spec.architecture], "dtype": DTYPES[dtype].torch, **spec.config}
    classes = spec.dims[family.classifier_head.classes] if family.classifier_head else 0
    if not classes:
        return config
    names = list(labels) if labels is not None else [f"LABEL_{i}" for i in range(classes)]
    if len(names) != classes:
        raise UsageError(f"There are {len(names)} labels for {classes} classes. Give one label per class, in order.")
    return config | label_config(names)


def choose_image_processor(family: Family, candidates: Sequence[Model]) -> Mapping[str, Any] | None:
    if candidates:
        return candidates[0].image_processor
    return family.image_processor.default if family.image_processor else None


def to_small_files(config: Mapping[str, Any], image_processor: Mapping[str, Any] | None) -> dict[str, bytes]:
    files = {CONFIG_NAME: to_json(config)}
    if image_processor is not None:
        files[IMAGE_PROCESSOR_NAME] = to_json(image_processor)
    return files


def list_notes(
    spec: ConversionSpec,
    selection: Selection,
    image_processor: Mapping[str, Any] | None,
    *,
    is_published: bool,
    is_known: bool,
) -> tuple[str, ...]:
    """List the assumptions that the tensors do not confirm, and the files that are generated instead of copied."""
    notes = [] if is_published or (selection.config and is_known) else [*spec.notes]
    family = selection.family
    if family.image_processor is not None and image_processor is not None and not is_published:
        size, trained = family.image_processor.pixel_steps(image_processor).size, spec.config["image_size"]
        makes = f" ({size[1]} x {size[0]} pixels)" if size is not None else ""
        native = f"; the model's native size is {trained}" if size is not None and size != (trained, trained) else ""
        notes.append(
            f"the image processor of published {family.name} models{makes}: tensors do not show how images were "
            f"prepared{native}"
        )
    if selection.is_converted:
        files = [CONFIG_NAME] if image_processor is None else [CONFIG_NAME, IMAGE_PROCESSOR_NAME]
        notes.append(f"generated, not copied from the source: {', '.join(files)}")
    return tuple(notes)
