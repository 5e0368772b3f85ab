"""Restores the elements of a plan from JSON, and refuses those that no plan made by streamconv could have.

A plan file may be edited, damaged or hostile. It must not name a file outside of the output's folder, read outside of a
record, or take more time or memory than the plan of a model. Each function raises a ValueError.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from streamconv.arguments import shown_value
from streamconv.display import printable
from streamconv.errors import SourceError
from streamconv.files.address import Address
from streamconv.files.base import ByteRange, FileRef
from streamconv.formats.limits import MAX_TENSORS, TooLargeError, are_sizes, check_name, is_shape, parse_small_json
from streamconv.formats.shards import MAX_FILES
from streamconv.formats.typed_json import parse
from streamconv.planning.plan import CONFIG_NAME, IMAGE_PROCESSOR_NAME, MappedTensor
from streamconv.planning.reads import refuse_unstreamable
from streamconv.planning.shards import MAX_SHARDS, Shard, weight_filenames
from streamconv.planning.small_files import DROPPED
from streamconv.tensors.computed import Cast, Elementwise
from streamconv.tensors.concatenation import concat
from streamconv.tensors.expressions import Expression, Read, Record
from streamconv.tensors.info import DTYPES, TensorInfo

MAX_DEPTH = 50  # of nested expressions: evaluating them recurses. Those of our families have up to five levels.
_MAX_CONTAINERS = 40 * MAX_TENSORS  # a source tensor takes up to 20 lists
_MAX_COMMAS = 100 * MAX_TENSORS
_MAX_KEYS = 8 * MAX_TENSORS  # mostly of labels, two for each class
_MAX_TARGETS = 4 * MAX_TENSORS  # a tensor of queries, keys and values becomes three
_MAX_FILES = MAX_FILES + 1_000  # besides weight files, those of a head and of constants

T = TypeVar("T")


def check_amount(text: str) -> None:
    """Check that parsing a plan takes no more memory than that of the largest model."""
    containers = text.count("[") + text.count("{")
    if containers > _MAX_CONTAINERS or text.count(",") > _MAX_COMMAS or text.count(":") > _MAX_KEYS:
        raise ValueError(f"it holds more than {MAX_TENSORS:,} tensors need")


def files(values: Sequence[Sequence[Any]]) -> list[FileRef]:
    """Return the files of the source."""
    if len(values) > _MAX_FILES:
        raise ValueError(f"it names {len(values):,} files")
    return [_file(*value) for value in values]


def _file(kind: object, location: object, size: object, version: Sequence[Sequence[object]]) -> FileRef:
    place, items = parse(str, location, "location"), [parse(tuple[str | int | None, ...], pair) for pair in version]
    if kind not in ("path", "address") or "\0" in place or (kind == "path" and not Path(place).is_absolute()):
        raise ValueError(f"{printable(place)} is neither an absolute path nor an address")
    pairs = tuple((parse(str, key, "version"), value) for key, value in items)
    return FileRef(Path(place) if kind == "path" else Address(place), _size(size), pairs)


def record(
    sources: Sequence[FileRef], file: object, name: object, start: object, length: object, crc: object
) -> Record:
    """Return a record, which lies within its file."""
    found = Record(
        item(sources, file), parse(str, name, "record"), ByteRange(_size(start), _size(length)),
        None if crc is None else _size(crc),
    )  # fmt: skip
    if found.range.end > found.file.size:
        raise ValueError(f"the record {printable(found.name)} does not lie within {printable(found.file.name)}")
    return found


def item(items: Sequence[T], index: object) -> T:
    """Return the file or the record of this number, which counts from 0."""
    return items[_size(index)]


def tensor_info(dtype: object, shape: Sequence[object]) -> TensorInfo:
    if type(dtype) is not str or dtype not in DTYPES or type(shape) is not list or not is_shape(shape):
        raise ValueError("a tensor's dtype or shape is not valid")
    return TensorInfo(DTYPES[dtype].code, tuple(shape))


def mapped_tensor(source: object, dtype: object, shape: Sequence[object], targets: object) -> MappedTensor:
    names: tuple[str, ...] = parse(tuple[str, ...], targets, "mapping")
    return MappedTensor(parse(str, source, "mapping"), tensor_info(dtype, shape), names)


def read(info: TensorInfo, of: Record, offset: object, strides: Sequence[object]) -> Read:
    """Return a view, which lies within its record."""
    if type(strides) is not list or len(strides) != len(info.shape) or not are_sizes(strides):
        raise ValueError("a tensor's strides are not valid")
    found = Read(info, of, _size(offset), tuple(strides))
    if found.offset + found.span > of.range.length:
        raise ValueError(f"a tensor does not lie within the record {printable(of.name)}")
    return found


def concatenation(dim: object, operands: Sequence[Expression]) -> Expression:
    return concat(operands, _size(dim))


def computed(kind: object, info: TensorInfo, operands: Sequence[Expression]) -> Expression:
    """Return a cast, a sum or a product."""
    infos = [operand.info for operand in operands]
    if kind == "cast" and [each.shape for each in infos] == [info.shape]:
        if all(DTYPES[each.dtype].is_weight for each in (info, *infos)):
            return Cast(info, *operands)
    elif (kind == "multiply" or kind == "add") and infos == [info, info] and DTYPES[info.dtype].is_weight:
        return Elementwise(info, kind, *operands)
    raise ValueError(f"a tensor of the kind {shown_value(kind)} is not valid")


def check_layout(files: Sequence[Sequence[Any]]) -> None:
    """Check the weight files' names and numbers of tensors: each is a pair of a name and a list."""
    if not 0 < len(files) <= MAX_SHARDS or [name for name, _ in files] != weight_filenames(len(files)):
        raise ValueError("its weight files do not have the names that streamconv gives them")
    if (count := sum(len(tensors) for _, tensors in files)) > _MAX_TARGETS:
        raise ValueError(f"it has {count:,} tensors")


def check_shards(shards: Sequence[Shard]) -> None:
    """Check the weight files: each tensor has another name, and can be streamed."""
    targets = {name: tensor for shard in shards for name, tensor in shard.tensors}
    if len(targets) != sum(len(shard.tensors) for shard in shards):
        raise ValueError("two files have a tensor of one name")
    try:
        for name in targets:
            check_name(name, "it")
        refuse_unstreamable(targets)
    except SourceError as error:
        raise ValueError(str(error)) from None


def check_small_files(contents: Mapping[str, bytes]) -> None:
    """Check the small files: nothing else is named, they can be read again, and they choose no code."""
    if unknown := [name for name in contents if name not in (CONFIG_NAME, IMAGE_PROCESSOR_NAME)]:
        raise ValueError(f"it would write {printable(unknown[0])}, which no conversion writes")
    for name, data in contents.items():
        try:
            value = parse_small_json(data)
        except TooLargeError as error:
            raise ValueError(f"its {name} {error} than the settings of any model") from None
        if chosen := [key for key in DROPPED if key in value]:
            raise ValueError(f"its {name} has the entry {chosen[0]}, which no conversion writes")


def _size(value: object) -> int:
    if not isinstance(value, int) or not are_sizes([value]):
        raise ValueError(f"{shown_value(value)} is not a size, a position or a number")
    return value
