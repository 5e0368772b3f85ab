"""Converts plans to JSON and back. The restored plan is equal, except for secrets in URLs.

Files and records are listed once and referred to by number. Headers, the index and the small files are not stored: they
follow from the rest. Users, passwords and queries of URLs are not stored either, so that no secret is written.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streamconv.display import printable
from streamconv.families.registry import family_named
from streamconv.families.selection import Skipped
from streamconv.files.address import Address
from streamconv.files.base import FileRef
from streamconv.formats.safetensors import make_index
from streamconv.formats.typed_json import parse
from streamconv.planning import restored
from streamconv.planning.plan import CONFIG_NAME, Origin, Plan, with_int_ids
from streamconv.planning.shards import Shard, make_shard
from streamconv.planning.shards import to_json as json_bytes
from streamconv.tensors.computed import Elementwise
from streamconv.tensors.concatenation import Concat
from streamconv.tensors.expressions import Expression, Read, Record

FORMAT_VERSION = 3


@dataclass(frozen=True)
class _Fields:
    """What a plan has besides its files, records and tensors."""

    family: str
    model: str | None
    is_published: bool
    assumed_heads: int | None
    dimensions: Mapping[str, Any]
    architecture: str
    config: Mapping[str, Any]
    image_processor: Mapping[str, Any] | None
    image_processor_from: Origin
    other_files: Mapping[str, str]
    notes: tuple[str, ...]
    unproved: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    filled: Mapping[str, float]
    block_chunks: int


def to_json(plan: Plan) -> str:
    """Return the plan as a JSON object."""
    files = {file: i for i, file in enumerate(plan.sources())}
    tensors = [tensor for shard in plan.shards for _, tensor in shard.tensors]
    leaves = (leaf for tensor in tensors for leaf in tensor.leaves())
    records = {record: i for i, record in enumerate(dict.fromkeys(leaf.record for leaf in leaves))}
    value = {
        "format_version": FORMAT_VERSION,
        "family": plan.family_name,
        "model": plan.model_name,
        "is_published": plan.is_published,
        "assumed_heads": plan.assumed_heads,
        "dimensions": asdict(plan.dimensions),
        "architecture": plan.architecture,
        "files": [_file_to_json(file) for file in files],
        "records": [[files[r.file], r.name, r.range.start, r.range.length, r.crc32] for r in records],
        "mapping": [[m.source, m.info.dtype, m.info.shape, m.targets] for m in plan.mapping],
        "shards": [
            [s.filename, [[name, _tensor_to_json(tensor, records)] for name, tensor in s.tensors]] for s in plan.shards
        ],
        "config": plan.config,
        "image_processor": plan.image_processor,
        "image_processor_from": plan.image_processor_from,
        "other_files": {name: data.decode() for name, data in plan.small_files.items() if name != CONFIG_NAME},
        "notes": plan.notes,
        "unproved": plan.unproved,
        "skipped": [asdict(each) for each in plan.skipped],
        "filled": plan.filled,
        "block_chunks": plan.block_chunks,
    }
    return json.dumps(value)


def from_json(text: str) -> Plan:
    """Return the plan that `to_json` wrote.

    Raises:
        ValueError: it is not such a plan, or has another version of the format.
    """
    restored.check_amount(text)
    try:
        value = json.loads(text)
        if value["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format is version {printable(value['format_version'])}, not {FORMAT_VERSION}")
        return _plan(value)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not a plan: {type(error).__name__}: {error}") from error


def _plan(value: dict[str, Any]) -> Plan:
    fields: _Fields = parse(_Fields, value)
    files = restored.files(value["files"])
    records = [restored.record(files, *each) for each in value["records"]]
    restored.check_layout(value["shards"])
    shards = tuple(make_shard(filename, _tensors_from_json(tensors, records)) for filename, tensors in value["shards"])
    restored.check_shards(shards)
    index = _index(shards) if len(shards) > 1 else None
    config = with_int_ids(fields.config)
    small_files = {
        CONFIG_NAME: json_bytes(config),
        **{name: data.encode() for name, data in fields.other_files.items()},
    }
    restored.check_small_files(small_files)
    dimensions = type(family_named(fields.family).models[0].dimensions)
    return Plan(
        family_name=fields.family,
        model_name=fields.model,
        is_published=fields.is_published,
        assumed_heads=fields.assumed_heads,
        dimensions=parse(dimensions, fields.dimensions, "dimensions"),
        architecture=fields.architecture,
        mapping=tuple(restored.mapped_tensor(*each) for each in value["mapping"]),
        shards=shards,
        config=config,
        image_processor=fields.image_processor,
        image_processor_from=fields.image_processor_from,
        small_files=small_files,
        index=index,
        notes=fields.notes,
        unproved=fields.unproved,
        skipped=fields.skipped,
        filled=fields.filled,
        block_chunks=fields.block_chunks,
    )


def _index(shards: tuple[Shard, ...]) -> bytes:
    targets = {name: tensor for shard in shards for name, tensor in shard.tensors}
    return json_bytes(make_index(targets, {name: shard.filename for shard in shards for name, _ in shard.tensors}))


def _file_to_json(file: FileRef) -> list[Any]:
    kind = "address" if isinstance(file.location, Address) else "path"
    return [kind, str(file.location), file.size, [list(pair) for pair in file.version]]


def _tensor_to_json(tensor: Expression, records: Mapping[Record, int]) -> list[Any]:
    info = [tensor.info.dtype, tensor.info.shape]
    if isinstance(tensor, Read):
        return ["read", *info, records[tensor.record], tensor.offset, tensor.strides]
    operands = [_tensor_to_json(operand, records) for operand in tensor.operands]
    if isinstance(tensor, Concat):
        return ["concat", tensor.dim, *operands]
    return [tensor.operator if isinstance(tensor, Elementwise) else "cast", *info, *operands]


def _tensors_from_json(tensors: list[Any], records: Sequence[Record]) -> dict[str, Expression]:
    found = {name: _tensor_from_json(each, records) for name, each in tensors}
    if len(found) != len(tensors):
        raise ValueError("a file has two tensors of one name")
    return found


def _tensor_from_json(value: list[Any], records: Sequence[Record], depth: int = 0) -> Expression:
    kind, *rest = value
    if depth > restored.MAX_DEPTH:
        raise ValueError("a tensor is nested too deeply")

    def operand(value: list[Any]) -> Expression:
        return _tensor_from_json(value, records, depth + 1)

    if kind == "concat":
        dim, *operands = rest
        return restored.concatenation(dim, [*map(operand, operands)])
    dtype, shape, *rest = rest
    info = restored.tensor_info(dtype, shape)
    if kind == "read":
        record, offset, strides = rest
        return restored.read(info, restored.item(records, record), offset, strides)
    return restored.computed(kind, info, [*map(operand, rest)])
