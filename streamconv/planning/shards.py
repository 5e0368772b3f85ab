"""The layout of safetensors files: the tensors of each file, their order, and the header.

The layout is that of transformers' save_pretrained (5.x), with headers as the safetensors library writes them, so
that a converted model is byte-identical to a saved one. Pure data, no I/O.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.arguments import shown_value
from streamconv.errors import UsageError
from streamconv.formats.safetensors import SINGLE_NAME, make_header, make_index
from streamconv.formats.shards import MAX_FILES
from streamconv.tensors.expressions import Expression

DEFAULT_SHARD_BYTES = 5 * 10**9
MAX_SHARDS = MAX_FILES  # the manifest and the journal list them all, and must be small enough to be read again
MIN_BARE_BYTES = 100_000  # a smaller number without a unit is taken for a mistake, such as 5 for 5GB


@dataclass(frozen=True)
class Shard:
    """One safetensors file: the bytes of its header, then ``tensors`` by name, in this order and without gaps."""

    filename: str
    header: bytes
    tensors: tuple[tuple[str, Expression], ...]

    @property
    def size(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + sum(tensor.info.nbytes for _, tensor in self.tensors)


def parse_size(size: int | str) -> int:
    """Parse a number of bytes, or a size with a unit in any case: "500MB" and "500m" are 500,000,000 bytes.

    "500MiB" is 500 * 1024 * 1024 bytes, as in transformers. A "b" always stands for bytes, as in huggingface_hub.

    Raises:
        UsageError: it is not a size, is not above 0, or is a number without a unit that cannot be meant in bytes.
    """
    text = shown_value(size) if isinstance(size, int) else str(size)
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(B|([KMGT])(I?)B?)?", text.strip().upper())
    number, unit, prefix, is_binary = match.groups() if match is not None else ("0", "", "", "")
    count = int(float(number) * (1024 if is_binary else 1000) ** " KMGT".index(prefix or " "))
    if not count:
        raise UsageError(f"{shown_value(size)} is not a shard size. Write it as 500MB or 5GB.")
    if unit is None and count < MIN_BARE_BYTES:
        raise UsageError(
            f"{size} is a shard size in bytes, which is too small. Add its unit: {number}GB or {number}MB."
        )
    return count


def lay_out(targets: Mapping[str, Expression], max_bytes: int) -> tuple[tuple[Shard, ...], bytes | None]:
    """Divide ``targets``, in their order, into files of at most ``max_bytes``, as transformers does.

    A tensor that is larger than that has a file to itself.

    Returns:
        The files, and the bytes of their index; None if there is only one file.
    """
    if sum(tensor.info.nbytes for tensor in targets.values()) <= max_bytes:
        return (make_shard(SINGLE_NAME, targets),), None
    files = _cut(targets, max_bytes)
    if len(files) == 1:  # one tensor, larger than the limit
        return (make_shard(SINGLE_NAME, targets),), None
    if len(files) > MAX_SHARDS:
        raise UsageError(
            f"{len(files):,} weight files are too many; up to {MAX_SHARDS:,} can be written. Give a larger "
            "--max-shard-size."
        )
    names = weight_filenames(len(files))
    shards = tuple(make_shard(name, tensors) for name, tensors in zip(names, files, strict=True))
    weight_map = {key: shard.filename for shard, tensors in zip(shards, files, strict=True) for key in tensors}
    return shards, to_json(make_index(targets, weight_map))


def weight_filenames(count: int) -> list[str]:
    """Return the names of this number of weight files, in order."""
    return [SINGLE_NAME] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _cut(targets: Mapping[str, Expression], max_bytes: int) -> list[dict[str, Expression]]:
    """Fill one file after the other; a tensor larger than ``max_bytes`` comes before the file that is being filled."""
    files: list[dict[str, Expression]] = []
    current: dict[str, Expression] = {}
    size = 0
    for name, tensor in targets.items():
        if tensor.info.nbytes > max_bytes:
            files.append({name: tensor})
            continue
        if size + tensor.info.nbytes > max_bytes:
            files.append(current)
            current, size = {}, 0
        current[name] = tensor
        size += tensor.info.nbytes
    return [*files, current] if current else files


def make_shard(filename: str, tensors: Mapping[str, Expression]) -> Shard:
    """Lay out one file; see `make_header` for the order of its tensors."""
    header, names = make_header({name: tensor.info for name, tensor in tensors.items()})
    return Shard(filename, header, tuple((name, tensors[name]) for name in names))


def to_json(value: Mapping[str, Any]) -> bytes:
    """Format a JSON file as transformers does."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
