"""Decides config.json: a new one, or the source's own with the few entries that the conversion changes.

The source's entries are kept as they are, unknown ones included: a threshold, a list of layers or a task that training
recorded cannot be found in tensors. Only these are not kept: the dtype; the architecture, if the output has another
one; and `DROPPED`, which describe the files that the source came in, or which code is to run the model.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from streamconv.display import first_lines, printable
from streamconv.errors import SourceError, UsageError
from streamconv.families.base import ConversionSpec, Family
from streamconv.families.selection import Selection
from streamconv.formats.limits import TooLargeError, parse_small_json
from streamconv.planning.image_processor import ChosenImageProcessor
from streamconv.planning.plan import CONFIG_NAME, IMAGE_PROCESSOR_NAME, label_config, with_int_ids
from streamconv.planning.shards import to_json
from streamconv.tensors.info import DTYPES

# The version and the folder that the source was saved by, an older name of dtype, code that the output does not have,
# and a quantisation that its tensors do not have. transformers writes none of the others, which choose kernels (it may
# download and run those that are named by a repository) and devices. Verification runs the model without them.
DROPPED = (
    "transformers_version", "_name_or_path", "torch_dtype", "auto_map", "quantization_config", "transformers_weights",
    "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation",
    "fusion_config", "distributed_config", "base_model_tp_plan", "base_model_pp_plan", "base_model_fsdp_plan",
)  # fmt: skip

MAX_CLASSES = 90_000  # config.json names each twice, and has to stay within the limits on settings
MAX_SHOWN = 20  # entries of config.json that a note names


def make_config(
    spec: ConversionSpec, family: Family, dtype: str, labels: Sequence[str] | None, source: Mapping[str, Any]
) -> dict[str, Any]:
    """Return config.json. ``source`` is the source's own, whose contradictions with ``spec`` were refused before."""
    config = {**spec.config}
    if source:
        # The entries of ``spec`` that do not follow from tensors have transformers' defaults.
        needed = {key: value for key, value in spec.config.items() if key not in family.free_config_keys}
        config = {**needed, **{key: value for key, value in source.items() if key not in DROPPED}}
        config |= {key: value for key, value in spec.config.items() if key in family.tensor_config_keys}
    architectures = source.get("architectures")
    if not _has_architecture(architectures, spec, family):
        architectures = [spec.architecture]
    config |= {"architectures": architectures, "dtype": DTYPES[dtype].torch}
    return with_int_ids(config | _labels(spec, family, labels, source))


def architecture_of(config: Mapping[str, Any], spec: ConversionSpec, family: Family) -> str:
    """Return transformers' class of the model that ``config`` describes."""
    return next(name for name in _architectures(spec, family) if name in config["architectures"])


def _has_architecture(names: Any, spec: ConversionSpec, family: Family) -> bool:
    return isinstance(names, list) and any(
        isinstance(name, str) and name in _architectures(spec, family) for name in names
    )


def _architectures(spec: ConversionSpec, family: Family) -> tuple[str, ...]:
    return (spec.architecture, *family.equal_architectures.get(spec.architecture, ()))


def _labels(
    spec: ConversionSpec, family: Family, labels: Sequence[str] | None, source: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the entries that name a classifier's classes; none if the source's own are kept."""
    classes = spec.dims[family.classifier_head.classes] if family.classifier_head else 0
    if not classes or (labels is None and "id2label" in source):
        return {}
    names = list(labels) if labels is not None else [f"LABEL_{i}" for i in range(classes)]
    if len(names) != classes:
        raise UsageError(f"There are {len(names)} labels for {classes} classes. Give one label per class, in order.")
    return label_config(names)


def label_problems(spec: ConversionSpec, family: Family, source: Mapping[str, Any]) -> list[str]:
    """Compare the number of labels in the source's config.json with the classes that its head has."""
    classes = spec.dims[family.classifier_head.classes] if family.classifier_head else 0
    ids = source.get("id2label")
    if classes > MAX_CLASSES:
        return [
            f"the head has {classes:,} classes, and a config.json with more than {MAX_CLASSES:,} could not be read "
            "again: convert the backbone alone, without --head or with --select PREFIX"
        ]
    if not classes or ids is None or (isinstance(ids, Mapping) and len(ids) == classes):
        return []
    found = f"{len(ids)} classes" if isinstance(ids, Mapping) else printable(repr(ids))
    return [f"its config.json sets id2label to {found}, but the tensors show {classes}"]


def to_small_files(
    config: Mapping[str, Any], image_processor: ChosenImageProcessor, *, has_own_labels: bool
) -> dict[str, bytes]:
    """Format the files.

    Raises:
        UsageError: config.json would be too large to be read again, because of the user's labels.
        SourceError: a file would be too large to be read again, because of the source.
    """
    files = {CONFIG_NAME: to_json(config)}
    if image_processor.config is not None:
        files[IMAGE_PROCESSOR_NAME] = image_processor.file or to_json(image_processor.config)
    for name, data in files.items():
        try:
            parse_small_json(data)
        except TooLargeError as error:
            what = f"{name} could not be read again: as it would be written, it {error} than the settings of any model"
            if name == CONFIG_NAME and has_own_labels:
                raise UsageError(f"{what}. Give shorter labels, with fewer commas.") from None
            raise SourceError(f"{what}. Take out of the {name} that was read what the model does not need.") from None
    return files


def config_notes(config: Mapping[str, Any], selection: Selection) -> list[str]:
    """Describe the origin of config.json, if the source has one or should have one."""
    if not selection.is_converted:
        return []
    source = selection.config
    if not source:
        return [f"{CONFIG_NAME}: generated, since the source has none that can be used"]
    stored = source.get("dtype") or source.get("torch_dtype")
    before = {key: value for key, value in source.items() if key != "dtype"} | ({"dtype": stored} if stored else {})
    changed = [
        f"{key} {_shown(before[key])} → {_shown(value)}"
        for key, value in config.items()
        if key in before and before[key] != json.loads(json.dumps(value))
    ]
    parts = [
        ("changed", changed),
        ("added", [f"{key} {_shown(value)}" for key, value in config.items() if key not in before]),
        ("left out", [key for key in DROPPED if key in source and key != "torch_dtype"]),
    ]
    listed = [f"; {kind}: {', '.join(first_lines(each, MAX_SHOWN, len(each)))}" for kind, each in parts if each]
    return [f"{CONFIG_NAME}: kept from the source{''.join(listed)}"]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{len(value)} entries" if value else "none"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return printable(text)
