"""The bytes rung: the output against the source, byte by byte, without torch.

It reads both files anew, from the indexes on, so that nothing the conversion held in memory is
believed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.checkpoint import Checkpoint, open_checkpoint
from streamconv.checkpoint.safetensors import INDEX_NAME, SINGLE_NAME
from streamconv.crc import RecordChecks
from streamconv.errors import CorruptError, OutputError, SourceError
from streamconv.output import MANIFEST_NAME, read_manifest
from streamconv.plan import PIECE_BYTES, Plan, index_of
from streamconv.tensors import SourceTensor


@dataclass(frozen=True)
class ByteCheck:
    """``problems`` is empty where every byte is right; ``compared`` counts bytes of weights."""

    compared: int
    tensors: int
    problems: tuple[str, ...]


def check_bytes(folder: Path, plan: Plan, advance: Callable[[int], None]) -> ByteCheck:
    """Compare every tensor and small file of ``folder`` with what the plan takes from the source.

    Every record of the source that carries a CRC-32 is checked on the way, and the folder's own
    manifest, where it has one, against its files.

    Raises:
        SourceError: the source cannot be read. An output that cannot be is a problem among others.
    """
    wanted = {name: tensor for shard in plan.shards for name, tensor in shard.tensors}
    checks, compared = RecordChecks(), 0
    problems: list[str] = []
    for name, data in plan.files.items():
        problems += _json_differences(folder, name, json.loads(data))
    try:
        written = open_checkpoint(folder)
    except SourceError as error:
        return ByteCheck(0, len(wanted), (*problems, f"the output cannot be read: {error}"))
    with written:
        problems += [f"{name} is missing" for name in wanted.keys() - written.keys()]
        problems += [f"{name} should not be there" for name in written.keys() - wanted.keys()]
        problems += _file_problems(folder, written)
        for name, tensor in wanted.items():
            if name not in written:
                continue
            other = written[name]
            if other.info != tensor.info:
                problems.append(f"{name} is {other.info}, not {tensor.info}")
                continue
            problem = _first_difference(name, tensor, other, checks, advance)
            compared += tensor.info.nbytes
            if problem:
                problems.append(problem)
    try:
        checks.settle()
    except CorruptError as error:
        problems.append(str(error))
    problems += _manifest_problems(folder, plan)
    return ByteCheck(compared, len(wanted), tuple(sorted(problems)))


def _file_problems(folder: Path, written: Checkpoint) -> list[str]:
    """What an index says of the files, and weights that no index names."""
    used = {path.name for path in written.paths}
    problems = [f"{p.name} is no part of the model" for p in folder.glob("*.safetensors") if p.name not in used]
    if used == {SINGLE_NAME}:
        return problems + [f"{INDEX_NAME} is no part of the model"] * os.path.exists(folder / INDEX_NAME)
    places = {name: tensor.record.file.name for name, tensor in written.items()}
    return problems + _json_differences(folder, INDEX_NAME, index_of(written, places))


def _manifest_problems(folder: Path, plan: Plan) -> list[str]:
    """The folder's own word: its files' digests, and labels, which no source knows."""
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return []
        problems = []
        for name, shard in manifest["shards"].items():
            if _sha256(folder / name) != shard["sha256"]:
                problems.append(f"{name} has another sha256 than {MANIFEST_NAME} says")
        if manifest["labels"] and manifest["labels"]["sha256"] != plan.labels_digest:
            problems.append(f"config.json has other labels than {MANIFEST_NAME} says")
        return problems
    except (OSError, KeyError, TypeError, AttributeError, OutputError) as error:
        return [f"{MANIFEST_NAME} is of no finished conversion ({error})"]


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _first_difference(
    name: str, tensor: SourceTensor, other: SourceTensor, checks: RecordChecks, advance: Callable[[int], None]
) -> str | None:
    buffer = memoryview(bytearray(PIECE_BYTES))
    at, problem = 0, None
    for piece in tensor.split(PIECE_BYTES):
        part = buffer[: piece.info.nbytes]
        piece.read_into(part)
        checks.add(name, piece, part)
        theirs = bytearray(len(part))
        other.record.file.read_at(other.record.range.start + other.offset + at, memoryview(theirs))
        if problem is None and theirs != part:
            first = next(i for i, (a, b) in enumerate(zip(part, theirs, strict=True)) if a != b)
            element = (at + first) // tensor.info.itemsize
            problem = f"{name} differs from its source from element {element:,} on"
        at += len(part)
        advance(len(part))
    return problem


def _json_differences(folder: Path, name: str, want: Mapping[str, Any]) -> list[str]:
    """By value: other blanks, or the version line that transformers adds, are no difference."""
    try:
        have = json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return [f"{name} cannot be read: {error}"]
    if not isinstance(have, dict):
        return [f"{name} is no JSON object"]
    have.pop("transformers_version", None)
    want = json.loads(json.dumps(want))
    keys = sorted(key for key in want.keys() | have.keys() if want.get(key, _ABSENT) != have.get(key, _ABSENT))
    return [f"{name}: {key} is {_shown(have, key)}, not {_shown(want, key)}" for key in keys]


_ABSENT = object()


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    text = json.dumps(values[key])
    return text if len(text) < 60 else text[:57] + "…"
