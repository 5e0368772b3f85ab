"""Chooses the weight files of a folder, as transformers would, or the only ones that are there.

A folder is the user's own, so links in it are followed: files are often links into a cache or a store. An index is
not: it may come from anywhere, so the files that it names must be in its folder, under plain names.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from streamconv.errors import CorruptError, NotACheckpointError, SourceError, SourceMissingError, printable
from streamconv.files.address import Location
from streamconv.files.local import read_small
from streamconv.formats.foreign.folders import describe_folder, missing_link, snapshot_of
from streamconv.formats.foreign.zips import WEIGHTS_SUFFIXES
from streamconv.formats.limits import read_json
from streamconv.formats.safetensors import INDEX_NAME, SINGLE_NAME

_BIN_NAME = "pytorch_model.bin"
_INDEX = re.compile(r"\.(safetensors|bin)\.index\.(\w+\.)?json$")  # of all weights, or of a variant such as fp16
# In the order in which transformers looks for them.
_STANDARD_NAMES = (SINGLE_NAME, INDEX_NAME, _BIN_NAME, f"{_BIN_NAME}.index.json")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")
# Files of a training with the suffix of weights: settings, optimizers, random states.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states|openvino)")
MAX_LISTED = 1_000  # files of a folder that are looked at


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a checkpoint, each with the names of its tensors; None if no index lists them.

    ``index`` is the name of the index, "" without one. ``note`` says which files were chosen, if transformers would not
    find them.
    """

    names_by_location: Mapping[Location, set[str] | None]
    index: str = ""
    note: str = ""


def find_weights(folder: Path) -> WeightFiles:
    """Return the weight files of a folder, or of the only snapshot in a folder of the Hub's cache.

    Raises:
        SourceMissingError, NotACheckpointError: it has no weights, or weights of which one has to be named.
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
    raise SourceMissingError(f"{folder} holds no weights. {_elsewhere(folder, names)}")


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
    indexes = _without_duplicates([name for name in names if _INDEX.search(name)])
    if indexes:
        found = read_weights_index(folder / indexes[0])
        files = [*indexes, *(name for name in files if folder / name not in found.names_by_location)]
        if len(files) == 1:
            return WeightFiles(found.names_by_location, found.index, f"the weights are those that {files[0]} lists")
    elif _are_shards(folder, files) or len(files) == 1:
        return WeightFiles(
            dict.fromkeys(folder / name for name in files), note=f"the weights are those in {_some(files)}"
        )
    if files:
        raise NotACheckpointError(f"{folder} holds {len(files):,} files of weights. Give one of them: {_some(files)}.")
    return None


def standard_weights(folder: Path, names: Iterable[str]) -> WeightFiles | None:
    """Return the first weight file or index of these names, None if there is none.

    Raises:
        SourceMissingError: it is a link to a file that does not exist, or an index that names one.
        CorruptError: it is a damaged index.
    """
    for name in names:
        if os.path.exists(folder / name):
            if is_index(name):
                return read_weights_index(folder / name)
            return WeightFiles({folder / name: None})
        if missing := missing_link(folder / name):
            raise SourceMissingError(f"{folder / name} {missing}")
    return None


def read_weights_index(index: Path) -> WeightFiles:
    """Return the files that an index names, each with the names of its tensors.

    Raises:
        CorruptError: it is damaged, or names a file that is not in its folder.
        SourceMissingError: a file is missing.
    """
    weight_map = read_json(read_small(index), str(index)).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CorruptError(f"{index} has no weight_map, or an empty one.")
    kind, suffix = ("safetensors", ".safetensors") if ".safetensors." in index.name else ("weight", ".bin")
    files: dict[str, set[str]] = {}
    for name, filename in weight_map.items():
        if type(filename) is not str or not _is_safe_filename(filename, suffix):
            what = f"'{printable(filename)}'" if type(filename) is str else f"a {type(filename).__name__}"
            raise CorruptError(f"{index} names {what}, which is not a {kind} file in its folder.")
        files.setdefault(filename, set()).add(name)
    missing = [index.with_name(name) for name in sorted(files) if not os.path.exists(index.with_name(name))]
    if missing:
        link = missing_link(missing[0])
        raise SourceMissingError(
            f"{missing[0]}: there is no such file, although {index.name} names it. {len(missing):,} of its "
            f"{len(files):,} files are missing. {f'It {link}' if link else 'Fetch the whole folder again.'}"
        )
    return WeightFiles({index.with_name(filename): files[filename] for filename in sorted(files)}, index.name)


def check_weight_map(where: str, index: str, found: Iterable[str], listed: set[str]) -> None:
    """Require that a shard has the tensors that its index lists; otherwise, what loads depends on the loader's release.

    Raises:
        CorruptError: they differ.
    """
    different = listed.symmetric_difference(found)
    if different:
        name = min(different)
        what = "is only in the index" if name in listed else "is only in the file"
        raise CorruptError(
            f"{where} and {index} disagree on {len(different):,} tensors: '{printable(name)}' {what}. "
            "They belong to different models: fetch both again."
        )


def refuse_shard(location: Location) -> None:
    """Refuse one file of several that hold a checkpoint together, by its name.

    Raises:
        NotACheckpointError: it is one of several.
    """
    shard = _SHARD.fullmatch(location.name)
    if shard is not None and int(shard[3]) > 1:
        fix = (
            f"Give their folder: {location.parent}"
            if isinstance(location, Path)
            else "Fetch all into a folder, and give that"
        )
        raise NotACheckpointError(
            f"{location} is one of {int(shard[3]):,} files that hold a checkpoint together. {fix}."
        )


def is_index(name: str) -> bool:
    """Return whether a file of this name is an index, which lists the files of a checkpoint."""
    return _INDEX.search(name) is not None


def _list(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, MAX_LISTED))
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror}.") from error


def _is_safe_filename(filename: str, suffix: str) -> bool:
    return (
        filename.endswith(suffix)
        and filename.isprintable()
        and len(filename) <= 255
        and not {"/", "\\", ":"} & set(filename)
    )


def _without_duplicates(names: Sequence[str]) -> list[str]:
    """Drop files that are also there as safetensors, which transformers prefers."""
    kept = {_stem(name) for name in names if ".safetensors" in name}
    return [name for name in names if ".safetensors" in name or _stem(name) not in kept]


def _stem(name: str) -> str:
    """Return the name without its suffix: "model.fp16" for model.fp16.safetensors and model.fp16.bin."""
    return re.sub(r"\.\w+$", "", re.sub(r"\.(safetensors|bin)\.index", ".index", name))


def _are_shards(folder: Path, names: Sequence[str]) -> bool:
    """Return whether the files are the shards of one checkpoint.

    Raises:
        SourceMissingError: some of its shards are missing.
    """
    shards = [_SHARD.fullmatch(name) for name in names]
    if not names or not all(shards) or len({(shard[1], shard[3], shard[4]) for shard in shards if shard}) != 1:
        return False
    numbers = {int(shard[2]) for shard in shards if shard}
    count = int(shards[0][3]) if shards[0] else 0
    missing = [number for number in range(1, min(count, MAX_LISTED) + 1) if number not in numbers]
    if missing:
        raise SourceMissingError(
            f"{folder} holds {len(names):,} of the {count:,} files of a checkpoint; the first missing one is number "
            f"{missing[0]}. Fetch the whole folder again."
        )
    return True


def _elsewhere(folder: Path, names: Sequence[str]) -> str:
    """Name the folders in it that hold weights, or else some of its files."""
    inside = []
    for name in names[:MAX_LISTED]:
        try:
            with os.scandir(folder / name) as entries:
                if any(entry.name.lower().endswith(WEIGHTS_SUFFIXES) for entry in islice(entries, MAX_LISTED)):
                    inside.append(name)
        except OSError:  # a file
            continue
    if inside:
        return f"Give one of its folders that do: {_some(inside)}."
    return f"It holds {_some(names)}. Give a folder or a file with weights." if names else "It is empty."


def _some(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(map(printable, names[:count])) + more
