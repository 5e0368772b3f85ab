"""safetensors files before they are written: what stands in their headers, and which tensors follow.

They are laid out as transformers' save_pretrained (5.x) lays them out, headers as the safetensors
library writes them. Pure data, no I/O.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.errors import UsageError
from streamconv.formats.safetensors import SINGLE_NAME, index_of, make_header
from streamconv.tensors.expressions import SourceTensor

PIECE_BYTES = 512 << 10  # what is read and written at once: it stays in the cache of a CPU
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header's bytes, then ``tensors`` in this order without holes."""

    filename: str
    header: bytes
    tensors: tuple[tuple[str, SourceTensor], ...]

    @property
    def size(self) -> int:
        """Of the whole file, in bytes."""
        return len(self.header) + sum(tensor.target.nbytes for _, tensor in self.tensors)


def parse_size(size: int | str) -> int:
    """Bytes from a number or from words as huggingface_hub takes them: "500MB" is 500,000,000.

    Raises:
        UsageError: it is no size, or none above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])B)?", str(size).strip().upper())
    count = int(float(match[1]) * {None: 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2]]) if match else 0
    if not count:
        raise UsageError(f"{size!r} is no shard size. Write it as 500MB or 5GB.")
    return count


def lay_out(targets: Mapping[str, SourceTensor], max_bytes: int) -> tuple[tuple[Shard, ...], bytes | None]:
    """Lay ``targets`` out in files of at most ``max_bytes``, in their order, as transformers cuts them.

    Returns:
        The files, and the bytes of their index; None if one file holds all.
    """
    if sum(tensor.target.nbytes for tensor in targets.values()) <= max_bytes:
        return (make_shard(SINGLE_NAME, targets),), None
    # Only here, since huggingface_hub before 1.0 costs 20 MB to import.
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(targets),
        get_storage_size=lambda tensor: tensor.target.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    shards = tuple(
        make_shard(filename, {name: targets[name] for name in names})
        for filename, names in split.filename_to_tensors.items()
    )
    if not split.is_sharded:  # one tensor, larger than the limit
        return shards, None
    return shards, to_json(index_of(targets, split.tensor_to_filename))


def make_shard(filename: str, tensors: Mapping[str, SourceTensor]) -> Shard:
    """A file as `make_header` lays it out."""
    header, names = make_header({name: tensor.target for name, tensor in tensors.items()})
    return Shard(filename, header, tuple((name, tensors[name]) for name in names))


def to_json(value: Mapping[str, Any]) -> bytes:
    """As transformers writes its JSON files."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
