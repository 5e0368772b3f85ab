"""Checks the structure of an output folder: everything but the bytes of weights.

These are names, dtypes, shapes, the values of the small files, and the absence of other files that transformers would
load.
"""

import json
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from streamconv.errors import OutputError, SourceError
from streamconv.files.address import Location
from streamconv.files.folders import file_in, read_small
from streamconv.files.open import open_file
from streamconv.formats.checkpoint import Checkpoint, open_output
from streamconv.formats.limits import TooLargeError, parse_small_json
from streamconv.formats.safetensors import INDEX_NAME, SINGLE_NAME, make_index
from streamconv.output.manifest import MANIFEST_NAME, Manifest, WrittenFile
from streamconv.output.readable import reading_output, weights_in
from streamconv.planning.plan import Plan
from streamconv.tensors.expressions import Expression

MAX_LISTED = 5  # differences within one mapping, such as an index's weight map
_ABSENT = object()


def header_problems(folder: Location, plan: Plan) -> list[str]:
    """List everything in which the headers of the weight files differ from the plan.

    Raises:
        OutputError: a file cannot be read.
    """
    try:
        with reading_output(), open_output(folder) as written:
            return tensor_problems(planned_tensors(plan), written) + weight_file_problems(folder, written)
    except SourceError as error:
        return [f"the output cannot be read: {error}"]


def planned_tensors(plan: Plan) -> dict[str, Expression]:
    """Return the tensors of the output by name."""
    return {name: tensor for shard in plan.shards for name, tensor in shard.tensors}


def small_file_problems(folder: Location, plan: Plan) -> list[str]:
    """List the values in which config.json and the like differ from the planned ones."""
    return [p for name, data in plan.small_files.items() for p in _json_differences(folder, name, json.loads(data))]


def tensor_problems(planned: Mapping[str, Expression], written: Checkpoint) -> list[str]:
    """List missing and unexpected tensors, and those of another dtype or shape."""
    problems = [f"{name} is missing" for name in planned.keys() - written.keys()]
    problems += [f"{name} is unexpected" for name in written.keys() - planned.keys()]
    both = [(name, planned[name].info, written[name].info) for name in planned.keys() & written.keys()]
    return problems + [f"{name} is {have}, not {want}" for name, want, have in both if have != want]


def weight_file_problems(folder: Location, written: Checkpoint) -> list[str]:
    """List problems in the files' metadata, and weight files that the index does not name."""
    shards = {*written.names}
    used = shards if shards == {SINGLE_NAME} else {*shards, INDEX_NAME}
    problems = unexpected_weights(folder, used)
    for name in written.names:
        if (metadata := _metadata(file_in(folder, name))) != {"format": "pt"}:
            problems.append(f'{name} has the metadata {_as_text(metadata)}, not {{"format": "pt"}}')
    return problems


def index_problems(folder: Location, written: Checkpoint) -> list[str]:
    """List the values in which the index of the shards differs from what they contain."""
    filenames = {name: tensor.record.file.name for name, tensor in written.items()}
    if set(filenames.values()) == {SINGLE_NAME}:
        return []
    return _json_differences(folder, INDEX_NAME, make_index(written, filenames))


def unexpected_weights(folder: Location, expected: set[str]) -> list[str]:
    """List files that transformers would load although they are not among the ``expected`` ones."""
    return [f"{name} is not part of the model" for name in weights_in(folder) - expected]


def manifest_problems(folder: Location, files: Mapping[str, WrittenFile]) -> list[str]:
    """List the weight files whose sha256 is not the one in the folder's own manifest."""
    try:
        manifest = Manifest.read(folder)
    except OutputError as error:
        return [str(error)]
    if manifest is None:
        return []
    problems = []
    for name, file in manifest.files.items():
        if name.endswith(".safetensors") and name not in files:
            problems.append(f"{name} is missing, but {MANIFEST_NAME} lists it")
        elif name in files and file.sha256 and file.sha256 != files[name].sha256:
            problems.append(f"the sha256 of {name} is not the one in {MANIFEST_NAME}")
    return problems


def _json_differences(folder: Location, name: str, want: Mapping[str, Any]) -> list[str]:
    """Compare values: whitespace, and the version that transformers adds, do not matter."""
    try:
        with reading_output():
            have = parse_small_json(read_small(file_in(folder, name)))
    except TooLargeError as error:
        return [f"{name} {error} than any such file"]
    except (SourceError, ValueError) as error:
        return [f"{name} cannot be read: {error}"]
    if not isinstance(have, dict):
        return [f"{name} is not a JSON object"]
    have.pop("transformers_version", None)
    return [f"{name}: {problem}" for problem in value_differences("", json.loads(json.dumps(want)), have)]


def value_differences(place: str, want: Any, have: Any) -> list[str]:
    """Compare as JSON text, because True equals 1 in Python; mappings are compared key by key."""
    if not isinstance(want, dict) or not isinstance(have, dict):
        return [] if _as_text(want) == _as_text(have) else [f"{place} is {_shortened(have)}, not {_shortened(want)}"]
    keys = sorted(want.keys() | have.keys())
    pairs = [(f"{place}.{key}" if place else key, want.get(key, _ABSENT), have.get(key, _ABSENT)) for key in keys]
    found = [problem for pair in pairs for problem in value_differences(*pair)]
    more = [f"{place} has {len(found) - MAX_LISTED} more differences"] if place and len(found) > MAX_LISTED else []
    return found[: MAX_LISTED if more else None] + more


def _as_text(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True)


def _shortened(value: Any) -> str:
    text = _as_text(value)
    return text if len(text) < 60 else text[:57] + "…"


def _metadata(location: Location) -> Any:
    """Read the metadata of a safetensors file, whose header `open_output` has accepted."""
    with reading_output(), closing(open_file(location)) as file:
        return json.loads(file.read(8, int.from_bytes(file.read(0, 8), "little"))).get("__metadata__")
