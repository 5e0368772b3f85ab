"""Chooses the weight files of a folder: those that transformers would load, or else the only ones.

A folder is the user's own, so links in it are followed: files are often links into a cache or a store.
"""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

from streamconv.display import first_few, printable
from streamconv.errors import NotACheckpointError, SourceError, SourceMissingError
from streamconv.files.address import Location
from streamconv.files.folders import exists, file_in
from streamconv.files.local import LocalFile
from streamconv.formats.foreign.folders import describe_folder, missing_link, snapshot_of
from streamconv.formats.foreign.zips import WEIGHTS_SUFFIXES
from streamconv.formats.safetensors import INDEX_NAME, SINGLE_NAME
from streamconv.formats.shards import WeightFiles, are_shards, is_index, read_weights_index

_BIN_NAME = "pytorch_model.bin"
# In the order in which transformers looks for them.
_STANDARD_NAMES = (SINGLE_NAME, INDEX_NAME, _BIN_NAME, f"{_BIN_NAME}.index.json")
# Other files that have the suffix of weights: a training's settings, optimizers and random states.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states|openvino)")
_FOREIGN_SUFFIXES = (".h5", ".msgpack", ".onnx", ".gguf", ".pb", ".keras", ".npy", ".pdparams", ".pkl", ".pte", ".pt2")
MAX_LISTED = 1_000  # names of a folder that are read
MAX_FOLDERS = 100  # folders in it that are searched


def find_weights(folder: Path) -> WeightFiles:
    """Return the weight files of a folder, or of the only snapshot in a folder of the Hub's cache.

    Raises:
        SourceMissingError, NotACheckpointError: it has no weights, or several of which the user must name one.
        CorruptError, SourceError: its index is damaged or names files that are not in the folder.
    """
    folder = snapshot_of(folder) or folder
    if found := standard_weights(folder, _STANDARD_NAMES):
        return found
    names = _list(folder)
    if other := describe_folder(folder, names):
        raise NotACheckpointError(f"{folder} {other}")
    if found := _only_weights(folder, names):
        return found
    raise SourceMissingError(f"{folder} holds no weights. {_advice(folder, names)}")


def _only_weights(folder: Path, names: Sequence[str]) -> WeightFiles | None:
    """Return the only weight files of a folder, whatever their names are; None if there are none.

    Raises:
        NotACheckpointError: there are several.
        SourceMissingError: some of the files are missing.
    """
    files = [name for name in names if name.lower().endswith(WEIGHTS_SUFFIXES) and not _NO_WEIGHTS.match(name)]
    for name in files:
        if missing := missing_link(folder / name):
            raise SourceMissingError(f"{folder / name} {missing}")
    files = _without_duplicates([name for name in files if os.path.isfile(folder / name)])
    indexes = _without_duplicates([name for name in names if is_index(name)])
    if indexes:
        found = read_weights_index(folder / indexes[0])
        files = [*indexes, *(name for name in files if folder / name not in found.names_by_location)]
        if len(files) == 1:
            return WeightFiles(
                found.names_by_location, found.index, f"weights read from the files that {files[0]} lists"
            )
    elif are_shards(folder, files) or len(files) == 1:
        return WeightFiles(dict.fromkeys(folder / name for name in files), note=f"weights read from {first_few(files)}")
    if files:
        raise NotACheckpointError(
            f"{folder} holds {len(files):,} files of weights. Give one of them: {first_few(files)}."
        )
    return None


def standard_weights(folder: Location, names: Iterable[str]) -> WeightFiles | None:
    """Return the first weight file or index of these names, None if there is none.

    Raises:
        SourceMissingError: it is a link to a file that does not exist, or an index that names one.
        CorruptError: it is a damaged index.
        UnreadableError: whether there is one is not known.
    """
    for name in names:
        file = file_in(folder, name)
        if exists(file):
            return read_weights_index(file) if is_index(name) else WeightFiles({file: None})
        if isinstance(file, Path) and (missing := missing_link(file)):
            raise SourceMissingError(f"{file} {missing}")
    return None


def _list(folder: Path) -> list[str]:
    """Return the first `MAX_LISTED` names in a folder, sorted.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, MAX_LISTED))
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror}.") from error


def _without_duplicates(names: Sequence[str]) -> list[str]:
    """Drop files that are also there as safetensors, which transformers prefers."""
    kept = {_stem(name) for name in names if ".safetensors" in name}
    return [name for name in names if ".safetensors" in name or _stem(name) not in kept]


def _stem(name: str) -> str:
    """Return the name without its suffix: "model.fp16" for model.fp16.safetensors and model.fp16.bin."""
    return re.sub(r"\.\w+$", "", re.sub(r"\.(safetensors|bin)\.index", ".index", name))


def _advice(folder: Path, names: Sequence[str]) -> str:
    """Return what to do with a folder without weights."""
    from streamconv.formats.foreign.files import describe  # with tables that only this error needs

    pointers = [name for name in names if name.endswith(".dvc")]
    if pointers:
        return f"{printable(pointers[0])} is a DVC pointer: run `dvc pull` in this folder."
    # huggingface_hub keeps unfinished files beside the folder's, or in its cache beside the snapshots.
    for place in (folder / ".cache" / "huggingface" / "download", folder.absolute().parent.parent / "blobs"):
        if os.path.isdir(place) and any(name.endswith(".incomplete") for name in _list(place)):
            return "Its download is unfinished: run `hf download` again."
    for name in names:
        if name.endswith(_FOREIGN_SUFFIXES):
            with suppress(SourceError), closing(LocalFile(folder / name)) as file:
                return f"{printable(name)} {describe(file)}"
    inside: dict[str, list[str]] = {}
    for name in [name for name in names if os.path.isdir(folder / name)][:MAX_FOLDERS]:
        with suppress(SourceError):
            inside[name] = _list(folder / name)
    for name in reversed(inside):  # the last one is often the latest
        if other := describe_folder(folder / name, inside[name]):
            return f"Its folder {printable(name)} {other}"
    places = [name for name, held in inside.items() if any(each.lower().endswith(WEIGHTS_SUFFIXES) for each in held)]
    if places:
        return f"Give a folder in it that does: {first_few(places)}."
    return f"It holds {first_few(names)}. Give a folder or a file with weights." if names else "It is empty."
