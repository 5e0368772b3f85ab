"""The bytes rung: the output against the source, byte by byte, without torch.

It reads both files anew, from the indexes on, so that nothing the conversion held in memory is
believed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamconv.checkpoint import open_checkpoint
from streamconv.crc import RecordChecks
from streamconv.errors import CorruptError
from streamconv.plan import INDEX_NAME, PIECE_BYTES, Plan
from streamconv.tensors import SourceTensor


@dataclass(frozen=True)
class ByteCheck:
    """``problems`` is empty where every byte is right; ``compared`` counts bytes of weights."""

    compared: int
    tensors: int
    problems: tuple[str, ...]


def check_bytes(folder: Path, plan: Plan, advance: Callable[[int], None]) -> ByteCheck:
    """Compare every tensor and small file of ``folder`` with what the plan takes from the source.

    Every record of the source that carries a CRC-32 is checked on the way.

    Raises:
        SourceError: the output or the source cannot be read.
    """
    wanted = {name: tensor for shard in plan.shards for name, tensor in shard.tensors}
    checks, compared = RecordChecks(), 0
    problems = [*_other_files(folder, plan)]
    with open_checkpoint(folder) as written:
        problems += [f"{name} is missing" for name in wanted.keys() - written.keys()]
        problems += [f"{name} should not be there" for name in written.keys() - wanted.keys()]
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
    return ByteCheck(compared, len(wanted), tuple(sorted(problems)))


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


def _other_files(folder: Path, plan: Plan) -> list[str]:
    """Small files by their JSON values: a version line of transformers' own, or other blanks, are no difference."""
    problems = []
    files = dict(plan.files)
    if plan.index is not None:
        files[INDEX_NAME] = plan.index
    for name, data in files.items():
        try:
            have = json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        want = json.loads(data)
        if isinstance(have, dict):
            have.pop("transformers_version", None)
        keys = sorted(k for k in want.keys() | have.keys() if want.get(k, _NONE) != have.get(k, _NONE)) \
            if isinstance(have, dict) else ["its contents"]  # fmt: skip
        problems += [f"{name}: {key} is {_shown(have, key)}, not {_shown(want, key)}" for key in keys]
    return problems


_NONE = object()


def _shown(values: dict[str, object], key: str) -> str:
    if not isinstance(values, dict) or key not in values:
        return "absent"
    text = json.dumps(values[key])
    return text if len(text) < 60 else text[:57] + "…"
