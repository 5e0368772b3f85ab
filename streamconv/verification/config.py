"""The config check: the small files of an output, value by value.

These are config.json, the image processor's file and the shards' index. They decide which model transformers builds.
The bytes check covers the weights.
"""

import time
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from hashlib import sha256

from streamconv.errors import OutputError, SourceError
from streamconv.files.address import Location
from streamconv.files.folders import exists, file_in, read_small
from streamconv.formats.checkpoint import open_output
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.output.manifest import MANIFEST_NAME, Manifest, WrittenFile, is_weights
from streamconv.output.readable import reading_output
from streamconv.planning.plan import CONFIG_NAME, Plan
from streamconv.verification.result import Check
from streamconv.verification.structure import index_problems, small_file_problems


def check_config(folder: Location, plan: Plan, edited: Container[str] = ()) -> Check:
    """Compare every value of the folder's small files with the planned one.

    ``edited`` are the files that the user changed after the conversion; ``plan`` has what they may change.
    """
    start = time.monotonic()
    problems = small_file_problems(folder, plan) + _missing_files(folder, plan)
    if CONFIG_NAME not in edited:
        problems += _label_problems(folder, plan)
    with suppress(SourceError), open_output(folder) as written:  # the bytes check reports an unreadable output
        problems += index_problems(folder, written)
    names = _small_names(folder, plan)
    proves = f"every value in {_listed(names)} is as planned"
    return Check("config", not problems, proves, tuple(sorted(problems)), {"files": len(names)}).since(start)


def small_files(folder: Location, names: Iterable[str]) -> dict[str, WrittenFile]:
    """Return the sizes and sha256 of the small files among ``names`` that the folder has."""
    found = {}
    for name in names:
        if is_weights(name):
            continue
        with suppress(SourceError):  # the check reports it
            data = read_small(file_in(folder, name))
            found[name] = WrittenFile(len(data), sha256(data).hexdigest())
    return found


def _small_names(folder: Location, plan: Plan) -> list[str]:
    """Return the names of the planned files, and of the index if the folder is divided into shards."""
    return [*plan.small_files, *([INDEX_NAME] if _exists(folder, INDEX_NAME) else [])]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _missing_files(folder: Location, plan: Plan) -> list[str]:
    """List the small files that the folder's manifest names, but that are neither in the folder nor in the plan."""
    with suppress(OutputError):  # the bytes check reports an unreadable manifest
        manifest = Manifest.read(folder)
        names = [] if manifest is None else [name for name in manifest.files if not is_weights(name)]
        missing = [name for name in names if name not in plan.small_files and not _exists(folder, name)]
        return [f"{name} is missing, but {MANIFEST_NAME} lists it" for name in missing]
    return []


def _exists(folder: Location, name: str) -> bool:
    with reading_output():
        return exists(file_in(folder, name))


def _label_problems(folder: Location, plan: Plan) -> list[str]:
    """Compare a classifier's labels, which no source has, with those that the folder's manifest records."""
    with suppress(OutputError):  # the bytes check reports an unreadable manifest
        manifest = Manifest.read(folder)
        if manifest is not None and manifest.labels is not None and manifest.labels.sha256 != plan.labels_digest:
            return [f"the labels in config.json are not those in {MANIFEST_NAME}"]
    return []
