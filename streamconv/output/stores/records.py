"""The records of an output in a store that is not finished: small objects in the folder ``.streamconv`` of its prefix.

``.streamconv/conversion.json`` records the source and the plan. Each weight file has a record of its own, such as
``.streamconv/model-00001-of-00128.safetensors.json``: how to resume its upload or, once it is complete, its sha256 and
the version (ETag) of its object. A record is replaced as a whole.
"""

import json
from dataclasses import asdict, dataclass
from typing import TypeVar

from streamconv.errors import OutputError
from streamconv.formats.limits import parse_small_json
from streamconv.formats.typed_json import parse
from streamconv.logs import logger
from streamconv.output.manifest import FORMAT_VERSION, Provenance, WrittenFile

_log = logger(__name__)

RECORDS = ".streamconv"
CONVERSION = f"{RECORDS}/conversion.json"


@dataclass(frozen=True, kw_only=True)
class ConversionRecord:
    """The conversion that writes an output."""

    provenance: Provenance


@dataclass(frozen=True, kw_only=True)
class FileRecord(ConversionRecord):
    """A weight file that is being written, or is complete.

    ``part`` is the part that its process was given, such as "3/16". ``upload`` and ``part_bytes`` are the id and the
    part size of the upload to resume, and ``has_copies`` records whether the store copies some of its parts.
    ``written`` is set when the file is complete, and ``version`` is the version of its object.
    """

    part: str = ""
    upload: str = ""
    part_bytes: int = 0
    has_copies: bool = False
    written: WrittenFile | None = None
    version: str = ""


AnyRecord = TypeVar("AnyRecord", bound=ConversionRecord)


def record_name(file: str) -> str:
    """Return the name of a weight file's record."""
    return f"{RECORDS}/{file}.json"


def file_of(name: str) -> str:
    """Return the name of the weight file that a record in `RECORDS` is about."""
    return name.removesuffix(".json")


def to_bytes(record: ConversionRecord) -> bytes:
    return (json.dumps({"format_version": FORMAT_VERSION, **asdict(record)}) + "\n").encode()


def parse_record(kind: type[AnyRecord], data: bytes | None, where: str) -> AnyRecord | None:
    """Parse the contents of a record at ``where``; None if there is none, or if it is damaged.

    Raises:
        OutputError: it was written by another version of streamconv.
    """
    if data is None:
        return None
    try:
        value = parse_small_json(data)
        if isinstance(value, dict) and value.get("format_version") != FORMAT_VERSION:
            raise OutputError(
                f"{where} was written by another version of streamconv. Finish the conversion with that version, or "
                "choose another URL."
            )
        record: AnyRecord = parse(kind, value)
    except ValueError as error:
        _log.warning("%s is damaged (%s): ignoring it", where, error)
        return None
    return record
