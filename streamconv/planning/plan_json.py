"""Converts plans to JSON and back. The restored plan is equal, except for secrets in URLs.

Files and records are listed once and referred to by number. Headers, the index and the small files are not stored: they
follow from the rest. Users, passwords and queries of URLs are not stored either, so that no secret is written.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamconv.errors import UsageError
from streamconv.families.registry import family_named
from streamconv.families.selection import Skipped
from streamconv.files.address import Address, Location
from streamconv.files.base import ByteRange, FileRef
from streamconv.formats.safetensors import make_index
from streamconv.planning.plan import CONFIG_NAME, MappedTensor, Plan, with_int_ids
from streamconv.planning.shards import Shard, make_shard
from streamconv.planning.shards import to_json as json_bytes
from streamconv.tensors.computed import Cast, Elementwise
from streamconv.tensors.concatenation import Concat, concat
from streamconv.tensors.expressions import Expression, Read, Record
from streamconv.tensors.info import TensorInfo

FORMAT_VERSION = 2


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
        "has_index": plan.index is not None,
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
        UsageError: it is not such a plan, or has another version of the format.
    """
    try:
        value = json.loads(text)
        if value["format_version"] != FORMAT_VERSION:
            raise UsageError(
                f"The plan has format version {value['format_version']}, and this streamconv reads {FORMAT_VERSION}. "
                "Make it again."
            )
        return _plan(value)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"This is not a streamconv plan ({type(error).__name__}: {error}). Make it again.") from error


def _plan(value: dict[str, Any]) -> Plan:
    files = [_file_from_json(each) for each in value["files"]]
    records = [
        Record(files[file], name, ByteRange(start, length), crc32)
        for file, name, start, length, crc32 in value["records"]
    ]
    shards = tuple(
        make_shard(filename, {name: _tensor_from_json(each, records) for name, each in tensors})
        for filename, tensors in value["shards"]
    )
    config = with_int_ids(value["config"])
    dimensions = type(family_named(value["family"]).models[0].dimensions)
    return Plan(
        family_name=value["family"],
        model_name=value["model"],
        is_published=value["is_published"],
        assumed_heads=value["assumed_heads"],
        dimensions=dimensions(**value["dimensions"]),
        architecture=value["architecture"],
        mapping=tuple(
            MappedTensor(source, TensorInfo(dtype, tuple(shape)), tuple(targets))
            for source, dtype, shape, targets in value["mapping"]
        ),
        shards=shards,
        config=config,
        image_processor=value["image_processor"],
        image_processor_from=value["image_processor_from"],
        small_files={
            CONFIG_NAME: json_bytes(config),
            **{name: data.encode() for name, data in value["other_files"].items()},
        },
        index=_index(shards) if value["has_index"] else None,
        notes=tuple(value["notes"]),
        unproved=tuple(value["unproved"]),
        skipped=tuple(Skipped(**each) for each in value["skipped"]),
        filled=value["filled"],
        block_chunks=value["block_chunks"],
    )


def _index(shards: tuple[Shard, ...]) -> bytes:
    targets = {name: tensor for shard in shards for name, tensor in shard.tensors}
    return json_bytes(make_index(targets, {name: shard.filename for shard in shards for name, _ in shard.tensors}))


def _file_to_json(file: FileRef) -> list[Any]:
    kind = "address" if isinstance(file.location, Address) else "path"
    return [kind, str(file.location), file.size, [list(pair) for pair in file.version]]


def _file_from_json(value: list[Any]) -> FileRef:
    kind, location, size, version = value
    place: Location = Address(location) if kind == "address" else Path(location)
    return FileRef(place, size, tuple((key, each) for key, each in version))


def _tensor_to_json(tensor: Expression, records: Mapping[Record, int]) -> list[Any]:
    info = [tensor.info.dtype, tensor.info.shape]
    if isinstance(tensor, Read):
        return ["read", *info, records[tensor.record], tensor.offset, tensor.strides]
    operands = [_tensor_to_json(operand, records) for operand in tensor.operands]
    if isinstance(tensor, Concat):
        return ["concat", tensor.dim, *operands]
    return [tensor.operator if isinstance(tensor, Elementwise) else "cast", *info, *operands]


def _tensor_from_json(value: list[Any], records: Sequence[Record]) -> Expression:
    kind, *rest = value
    if kind == "concat":
        dim, *operands = rest
        return concat([_tensor_from_json(operand, records) for operand in operands], dim)
    dtype, shape, *rest = rest
    info = TensorInfo(dtype, tuple(shape))
    if kind == "read":
        record, offset, strides = rest
        return Read(info, records[record], offset, tuple(strides))
    operands = [_tensor_from_json(operand, records) for operand in rest]
    return Cast(info, *operands) if kind == "cast" else Elementwise(info, kind, *operands)
