"""The bytes rung: the output against the source, byte by byte, without torch.

It reads both files anew, from the indexes on, so that nothing the conversion held in memory is
believed.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.errors import CorruptError, OutputError, SourceError
from streamconv.files.base import File, FileRef
from streamconv.files.local import LocalFile, read_small
from streamconv.files.reader import Reader
from streamconv.formats.checkpoint import Checkpoint, open_checkpoint
from streamconv.formats.safetensors import INDEX_NAME, LOADED_BESIDE, SINGLE_NAME, index_of
from streamconv.output.hashing import BUFFER_BYTES, BackgroundHash
from streamconv.output.manifest import MANIFEST_NAME, Manifest, WrittenFile
from streamconv.planning.plan import Plan
from streamconv.tensors.casts import cast_into
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.expressions import SourceTensor, prefetch

SPAN_BYTES = 32 << 20  # between two reports of progress


@dataclass(frozen=True)
class ByteCheck:
    """``problems`` is empty where every byte is right; ``compared`` counts bytes of weights.

    ``files`` are the output's files of weights.
    """

    compared: int
    tensors: int
    problems: tuple[str, ...]
    files: Mapping[str, WrittenFile]


def check_bytes(folder: Path, plan: Plan, reader: Reader, advance: Callable[[int], None]) -> ByteCheck:
    """Compare every tensor and small file of ``folder`` with what the plan takes from the source.

    Every record of the source that carries a CRC-32 is checked on the way, and the folder's own
    manifest, where it has one, against its files.

    Raises:
        SourceError: the source cannot be read. An output that cannot be is a problem among others.
    """
    wanted = {name: tensor for shard in plan.shards for name, tensor in shard.tensors}
    checks, compared = RecordChecks(reader), 0
    problems: list[str] = []
    files: dict[str, WrittenFile] = {}
    for name, data in plan.small_files.items():
        problems += _json_differences(folder, name, json.loads(data))
    try:
        written = open_checkpoint(folder)
    except SourceError as error:
        return ByteCheck(0, len(wanted), (*problems, f"the output cannot be read: {error}"), files)
    with written, BackgroundHash() as digest:
        problems += _name_problems(wanted, written) + _file_problems(folder, written)
        for ref, names in _in_file_order(written).items():
            file = written.reader.open(ref)
            prefetch([wanted[name] for name in names if name in wanted], reader)
            _hash(file, 0, written[names[0]].record.range.start, digest)
            for name in names:
                source, output = wanted.get(name), written[name]
                if source is not None and source.target == output.info:
                    problems += _differences(name, source, output, file, reader, checks, digest, advance)
                    compared += source.target.nbytes
                else:
                    _hash(file, output.record.range.start, output.record.range.end, digest)
            files[file.name] = WrittenFile(file.size, digest.hexdigest())
    try:
        checks.verify_pending()
    except CorruptError as error:
        problems.append(str(error))
    problems += _manifest_problems(folder, plan, files)
    return ByteCheck(compared, len(wanted), tuple(sorted(set(problems))), files)


def check_files(folder: Path, manifest: Manifest, advance: Callable[[int, int], None]) -> list[str]:
    """List the files that differ from the folder's own manifest in size or sha256, and weights that it does not name.

    ``advance`` is called with the number of bytes done, and of all.
    """
    written = manifest.files
    problems = [f"{path.name} is no part of the model" for path in _weights_in(folder) if path.name not in written]
    total, done = sum(each.size for each in written.values()), 0
    for name, each in written.items():
        try:
            file = LocalFile(folder / name)
        except SourceError as error:
            problems.append(str(error))
            continue
        with closing(file), BackgroundHash() as digest:
            if file.size != each.size:
                problems.append(f"{name} has {file.size:,} bytes, not {each.size:,}")
                continue
            try:
                for start in range(0, file.size, SPAN_BYTES):
                    end = min(start + SPAN_BYTES, file.size)
                    _hash(file, start, end, digest)
                    done += end - start
                    advance(done, total)
            except SourceError as error:
                problems.append(str(error))
                continue
            if digest.hexdigest() != each.sha256:
                problems.append(f"{name} is not as it was written: its sha256 is another")
    return sorted(problems)


def check_names(folder: Path, plan: Plan) -> list[str]:
    """What is not as the plan says, but for the bytes of weights: names, dtypes, shapes, the small files."""
    wanted = {name: tensor for shard in plan.shards for name, tensor in shard.tensors}
    problems = [p for name, data in plan.small_files.items() for p in _json_differences(folder, name, json.loads(data))]
    try:
        with open_checkpoint(folder) as written:
            problems += _name_problems(wanted, written) + _file_problems(folder, written)
    except SourceError as error:
        problems.append(f"the output cannot be read: {error}")
    return sorted(problems)


def _name_problems(wanted: Mapping[str, SourceTensor], written: Checkpoint) -> list[str]:
    problems = [f"{name} is missing" for name in wanted.keys() - written.keys()]
    problems += [f"{name} should not be there" for name in written.keys() - wanted.keys()]
    both = [(name, wanted[name].target, written[name].info) for name in wanted.keys() & written.keys()]
    return problems + [f"{name} is {have}, not {want}" for name, want, have in both if have != want]


def _weights_in(folder: Path) -> set[Path]:
    return {path for pattern in LOADED_BESIDE for path in folder.glob(pattern)}


def _in_file_order(written: Checkpoint) -> dict[FileRef, list[str]]:
    """The tensors' names, file by file, as their bytes follow one another; there is nothing between them."""
    files: dict[FileRef, list[str]] = {}
    for name in sorted(written, key=lambda name: written[name].record.range.start):
        files.setdefault(written[name].record.file, []).append(name)
    return files


def _file_problems(folder: Path, written: Checkpoint) -> list[str]:
    """What an index says of the files, and weights that no index names."""
    shards = {path.name for path in written.paths}
    used = shards if shards == {SINGLE_NAME} else {*shards, INDEX_NAME}
    problems = [f"{path.name} is no part of the model" for path in _weights_in(folder) if path.name not in used]
    for path in written.paths:
        if (metadata := _metadata(path)) != {"format": "pt"}:
            problems.append(f'{path.name} has the metadata {_text(metadata)}, not {{"format": "pt"}}')
    if shards == {SINGLE_NAME}:
        return problems
    places = {name: tensor.record.file.name for name, tensor in written.items()}
    return problems + _json_differences(folder, INDEX_NAME, index_of(written, places))


def _manifest_problems(folder: Path, plan: Plan, files: Mapping[str, WrittenFile]) -> list[str]:
    """List what differs from the folder's own manifest: digests, and labels, which no source has."""
    try:
        manifest = Manifest.read(folder)
    except OutputError as error:
        return [str(error)]
    if manifest is None:
        return []
    problems = []
    for name, file in manifest.files.items():
        if name.endswith(".safetensors") and name not in files:
            problems.append(f"{name} is missing, and {MANIFEST_NAME} names it")
        elif name in files and file.sha256 != files[name].sha256:
            problems.append(f"{name} has another sha256 than {MANIFEST_NAME} says")
    if manifest.labels is not None and manifest.labels.sha256 != plan.labels_digest:
        problems.append(f"config.json has other labels than {MANIFEST_NAME} says")
    return problems


def _hash(file: File, start: int, end: int, digest: BackgroundHash) -> None:
    for at in range(start, end, BUFFER_BYTES):
        part = digest.next_buffer()[: min(BUFFER_BYTES, end - at)]
        file.read_at(at, part)
        digest.update(part)


def _differences(
    name: str,
    source: SourceTensor,
    output: SourceTensor,
    file: File,
    reader: Reader,
    checks: RecordChecks,
    digest: BackgroundHash,
    advance: Callable[[int], None],
) -> list[str]:
    """Where ``output``, all of which is hashed, first differs from ``source``."""
    wanted, stored = bytearray(BUFFER_BYTES), memoryview(bytearray(BUFFER_BYTES if source.cast_to else 0))
    at, differs = output.record.range.start, False
    problems: list[str] = []
    for piece in source.split(BUFFER_BYTES):
        size = piece.target.nbytes
        if size != len(wanted):  # bytearrays compare like memcmp, memoryviews an element at a time
            wanted = bytearray(size)
        data = stored[: piece.info.nbytes] if source.cast_to else memoryview(wanted)
        read = piece.read_into(data, reader)
        try:
            checks.add(name, piece, read)
        except CorruptError as error:
            problems.append(str(error))
        if source.cast_to:
            cast_into(data, source.info.dtype, memoryview(wanted), source.cast_to)
        part = digest.next_buffer()[:size]
        file.read_at(at, part)
        digest.update(part)
        if not differs and wanted != part:
            differs = True
            first = next(i for i, (a, b) in enumerate(zip(wanted, part, strict=True)) if a != b)
            cast_to = f", cast to {source.cast_to}," if source.cast_to else ""
            element = (at - output.record.range.start + first) // output.info.itemsize
            problems.append(f"{name} differs from its source{cast_to} from element {element:,} on")
        at += size
        advance(size)
    return problems


def _json_differences(folder: Path, name: str, want: Mapping[str, Any]) -> list[str]:
    """By value: other blanks, or the version line that transformers adds, are no difference."""
    try:
        have = json.loads(read_small(folder / name))
    except (SourceError, ValueError, RecursionError) as error:
        return [f"{name} cannot be read: {error}"]
    if not isinstance(have, dict):
        return [f"{name} is no JSON object"]
    have.pop("transformers_version", None)
    return [f"{name}: {problem}" for problem in _value_differences("", json.loads(json.dumps(want)), have)]


_ABSENT = object()
SHOWN = 5  # of the differences in one mapping, such as an index's


def _value_differences(place: str, want: Any, have: Any) -> list[str]:
    """By the values' JSON texts, since True equals 1 in Python; mappings are entered."""
    if not isinstance(want, dict) or not isinstance(have, dict):
        return [] if _text(want) == _text(have) else [f"{place} is {_shown(have)}, not {_shown(want)}"]
    keys = sorted(want.keys() | have.keys())
    pairs = [(f"{place}.{key}" if place else key, want.get(key, _ABSENT), have.get(key, _ABSENT)) for key in keys]
    found = [problem for pair in pairs for problem in _value_differences(*pair)]
    more = [f"{place} differs in {len(found) - SHOWN} more"] if place and len(found) > SHOWN else []
    return found[: SHOWN if more else None] + more


def _text(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True)


def _shown(value: Any) -> str:
    text = _text(value)
    return text if len(text) < 60 else text[:57] + "…"


def _metadata(path: Path) -> Any:
    """A safetensors file's, whose header `open_checkpoint` has read without an error."""
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
