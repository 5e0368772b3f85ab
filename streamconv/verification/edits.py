"""Finds what a user changed in the small files after the conversion, and what of it is accepted.

Values that do not follow from the weights, such as labels or the mean of the image processor, are the user's decision:
such edits are accepted, and named in the verdict. All other values must be as planned.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from streamconv.errors import SourceError
from streamconv.files.address import Location
from streamconv.files.folders import file_in, read_small
from streamconv.formats.limits import parse_small_json
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.output.finished import find_edited
from streamconv.output.manifest import MANIFEST_NAME, Manifest
from streamconv.planning.plan import CONFIG_NAME, IMAGE_PROCESSOR_NAME, Plan
from streamconv.planning.shards import to_json
from streamconv.source.labels import labels_in
from streamconv.verification.result import Check
from streamconv.verification.structure import value_differences

MAX_NAMED = 5  # values of one file
# Entries that transformers takes into account for any model, and that could change what is loaded or computed.
_GENERAL_KEYS = frozenset(
    {"architectures", "auto_map", "dtype", "model_type", "quantization_config", "torch_dtype", "transformers_weights"}
)
_LABEL_KEYS = frozenset({"id2label", "label2id"})


@dataclass(frozen=True)
class Edits:
    """``plan`` has the values that the user chose. ``values`` maps each edited file to its changes, in words.

    A file whose values are all as planned has none.
    """

    plan: Plan
    values: Mapping[str, tuple[str, ...]]

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all edited files."""
        return tuple(self.values)

    def named_in(self, config: Check) -> Check:
        """Add to the config check, which compared the files with `plan`, what was edited."""
        if config.passed is False and self.values:
            changed = f"changed after the conversion: {', '.join(self.values)}"
            config = replace(config, problems=(*config.problems, changed))
        changes = {name: found for name, found in self.values.items() if found}
        for name in self.values.keys() - changes.keys():
            same = f"{name} has other bytes than {MANIFEST_NAME} records, but the same values"
            config = replace(config, proves=f"{config.proves}; {same}")
        if not changes:
            return config
        notes = [f"{name} was edited after the conversion ({_listed(found)})" for name, found in changes.items()]
        return replace(config, proves=f"{config.proves} or was edited later", not_checked="; ".join(notes))


def find_edits(folder: Location, plan: Plan, manifest: Manifest | None) -> Edits:
    """Return what the user edited in a folder, and the plan with those edits that are the user's decision.

    Raises:
        OutputError: a file cannot be read.
    """
    values: dict[str, tuple[str, ...]] = {}
    edited = find_edited(folder, manifest.files) if manifest is not None else {}
    for name, file in sorted(edited.items()):
        have, data = _read(file_in(folder, name)), plan.small_files.get(name)
        if data is not None and not file.sha256:  # too large to be an edit; the config check reports it
            continue
        values[name] = ()
        if data is None and name != INDEX_NAME:
            values[name] = ("which was not compared with the source",)
        if have is None or data is None:
            continue
        planned = json.loads(data)
        wanted = _with_free_values(planned, have, plan) if name == CONFIG_NAME else have
        found = tuple(value_differences("", planned, wanted))
        if name == CONFIG_NAME and not found and manifest is not None and _has_other_labels(have, plan, manifest):
            found = ("its labels",)
        values[name] = found
        if found:  # otherwise, it is only formatted differently
            plan = _with_file(plan, name, wanted)
    return Edits(plan, values)


def _read(path: Location) -> dict[str, Any] | None:
    """Read a file that the config check refuses if it is not a JSON object."""
    with suppress(SourceError, ValueError):
        value = parse_small_json(read_small(path))
        return value if isinstance(value, dict) else None
    return None


def _with_free_values(planned: Mapping[str, Any], have: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return config.json as planned, but with the entries of ``have`` that do not describe the weights."""
    free = (plan.family.free_config_keys | (have.keys() - planned.keys())) - _GENERAL_KEYS
    if "id2label" in planned and len(labels_in(have)) == len(planned["id2label"]):
        free |= _LABEL_KEYS
    kept = {key: value for key, value in planned.items() if key not in free or key in have}
    return {**kept, **{key: value for key, value in have.items() if key in free and key != "transformers_version"}}


def _has_other_labels(have: Mapping[str, Any], plan: Plan, manifest: Manifest) -> bool:
    """Return whether the labels are the plan's, which were read from this folder, but not those of the conversion."""
    return manifest.labels is not None and manifest.labels.sha256 != plan.labels_digest


def _with_file(plan: Plan, name: str, value: Mapping[str, Any]) -> Plan:
    plan = replace(plan, small_files={**plan.small_files, name: to_json(value)})
    if name == CONFIG_NAME:
        return replace(plan, config=value)
    if name == IMAGE_PROCESSOR_NAME:
        return replace(plan, image_processor=value, image_processor_from="edited")
    return plan


def _listed(found: tuple[str, ...]) -> str:
    more = f"; {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return "; ".join(found[:MAX_NAMED]) + more
