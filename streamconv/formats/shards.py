"""The files of a checkpoint that consists of several: its shards, and the index that lists them.

An index may come from anywhere, so the files that it names must be in its folder, under plain names.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv.display import printable
from streamconv.errors import CorruptError, NotACheckpointError, SourceError, SourceMissingError
from streamconv.files.address import Location
from streamconv.files.folders import beside, read_small
from streamconv.formats.foreign.folders import missing_link
from streamconv.formats.limits import MAX_TENSORS, read_json

_INDEX = re.compile(r"\.(safetensors|bin)\.index\.(\w+\.)?json$")  # of all weights, or of a variant such as fp16
_SHARD = re.compile(r"(.*)[-_](\d{5,6})-of-(\d{5,6})((?:\.\w+)+)")
MAX_FILES = 10_000  # of one checkpoint, each of which is open until the checkpoint is closed


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a checkpoint, each with the names of its tensors; None if no index lists them.

    ``index`` is the name of the index, "" without one. ``note`` names the files that were chosen, if transformers would
    not find them.
    """

    names_by_location: Mapping[Location, set[str] | None]
    index: str = ""
    note: str = ""


def read_weights_index(index: Location) -> WeightFiles:
    """Return the files that an index names, each with the names of its tensors. Those in a store may be missing.

    Raises:
        CorruptError: it is damaged, or names a file that is not in its folder.
        SourceMissingError: a file is missing.
        SourceError: it names too many files.
    """
    # Some releases of transformers wrote the total size as a float.
    weight_map = read_json(read_small(index), str(index), parse_float=float).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CorruptError(f"{index} has no weight_map, or an empty one.")
    kind, suffix = ("safetensors", ".safetensors") if ".safetensors." in index.name else ("weight", ".bin")
    files: dict[str, set[str]] = {}
    for name, filename in weight_map.items():
        if type(filename) is not str or not _is_safe_filename(filename, suffix):
            what = f"'{printable(filename)}'" if type(filename) is str else f"a {type(filename).__name__}"
            raise CorruptError(f"{index} names {what}, which is not a {kind} file in its folder.")
        files.setdefault(filename, set()).add(name)
    if len(files) > MAX_FILES:
        raise SourceError(
            f"{index} names {len(files):,} files of weights, and streamconv reads up to {MAX_FILES:,}. Save the model "
            "again in larger files."
        )
    paths = [index.with_name(name) for name in sorted(files)] if isinstance(index, Path) else []
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        link = missing_link(missing[0])
        raise SourceMissingError(
            f"{missing[0]}: there is no such file, although {index.name} names it. {len(missing):,} of its "
            f"{len(files):,} files are missing. {f'It {link}' if link else 'Fetch the whole folder again.'}"
        )
    return WeightFiles({beside(index, filename): files[filename] for filename in sorted(files)}, index.name)


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
    """Refuse a shard, by its name: the others are needed, too.

    Raises:
        NotACheckpointError: it is one of several shards.
    """
    shard = _SHARD.fullmatch(location.name)
    if shard is not None and int(shard[3]) > 1:
        fix = "Fetch all of them into a folder, and give that."
        if isinstance(location, Path):
            fix = f"Give their folder: {location.parent}."
        raise NotACheckpointError(f"{location} is one of the {int(shard[3]):,} shards of a checkpoint. {fix}")


def is_index(name: str) -> bool:
    """Return whether a file of this name is an index, which lists the files of a checkpoint."""
    return _INDEX.search(name) is not None


def are_shards(folder: Path, names: Sequence[str]) -> bool:
    """Return whether the files are the shards of one checkpoint.

    Raises:
        SourceMissingError: some of its shards are missing.
    """
    shards = [_SHARD.fullmatch(name) for name in names]
    if not names or not all(shards) or len({(shard[1], shard[3], shard[4]) for shard in shards if shard}) != 1:
        return False
    numbers = {int(shard[2]) for shard in shards if shard}
    count = int(shards[0][3]) if shards[0] else 0
    missing = [number for number in range(1, min(count, MAX_TENSORS) + 1) if number not in numbers]
    if missing:
        raise SourceMissingError(
            f"{folder} holds {len(names):,} of the {count:,} files of a checkpoint; the first missing one is number "
            f"{missing[0]}. Fetch the whole folder again."
        )
    return True


def _is_safe_filename(filename: str, suffix: str) -> bool:
    return (
        filename.endswith(suffix)
        and filename.isprintable()
        and len(filename) <= 255
        and not {"/", "\\", ":"} & set(filename)
    )
