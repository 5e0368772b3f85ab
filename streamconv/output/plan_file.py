"""Plans as files: what to write and from where, to be executed by other processes, at other times, on other machines.

A plan file has three lines of JSON: the format's name and version, streamconv's version and the sha256 of the rest;
then what the manifest of the output will record; then the plan (`plan_json`). Files and records are named by location,
size and version, so a source that was changed since is refused when it is opened.
"""

import json
import os
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from streamconv._version import __version__
from streamconv.display import printable
from streamconv.errors import OutputError, SourceError, SourceMissingError, UnreadableError, UsageError
from streamconv.files.address import Address
from streamconv.files.base import UNVERSIONED
from streamconv.files.inline import is_inline
from streamconv.files.local import read_small
from streamconv.formats.limits import parse_small_json
from streamconv.formats.typed_json import parse as parse_fields
from streamconv.output.files import as_output_error
from streamconv.output.manifest import Provenance
from streamconv.output.planned import PlannedConversion
from streamconv.planning import plan_json

FORMAT_NAME = "streamconv plan"
FORMAT_VERSION = 1
_START = f'{{"format": "{FORMAT_NAME}"'.encode()
MAX_PLAN_BYTES = 64 << 20  # 65,536 tensors, the largest number that is read, take about 30 MB


@dataclass(frozen=True)
class _Header:
    format: str
    format_version: int
    streamconv: str
    sha256: str


@dataclass(frozen=True)
class _Recorded:
    """What a `PlannedConversion` has besides its plan."""

    provenance: Provenance
    labels_from: str | None
    has_checksums: bool
    server_side_copy: bool


def to_bytes(planned: PlannedConversion) -> bytes:
    """Return the contents of a plan file.

    Raises:
        UsageError: a source's URL holds a secret, or nothing would show that the source has changed.
    """
    _refuse_unsafe_sources(planned)
    recorded = _Recorded(planned.provenance, planned.labels_from, planned.has_checksums, planned.server_side_copy)
    rest = f"{json.dumps(asdict(recorded))}\n{plan_json.to_json(planned.plan)}\n".encode()
    header = _Header(FORMAT_NAME, FORMAT_VERSION, __version__, sha256(rest).hexdigest())
    return json.dumps(asdict(header)).encode() + b"\n" + rest


def _refuse_unsafe_sources(planned: PlannedConversion) -> None:
    for file in planned.plan.sources():
        location = file.location
        if is_inline(file) or not isinstance(location, Address):
            continue
        if str(location) != location.url:
            raise UsageError(
                f"{location} holds a user, a password or a query, which everybody who can read the plan could use. "
                "Give a URL without it, such as s3:// or hf://, whose credentials come from the environment."
            )
        if any(key == UNVERSIONED for key, _ in file.version) and not planned.has_checksums:
            raise UsageError(
                f"The server of {location} names no version of the file, so a later change could not be noticed. Copy "
                "the file, and plan the conversion of the copy."
            )


def require_free(path: Path) -> None:
    """Check, before anything is planned, that a plan can be saved at ``path``. An earlier plan is replaced.

    Raises:
        OutputError: its folder does not exist, or another file, such as a checkpoint, is there.
    """
    if not os.path.isdir(path.parent):
        raise OutputError(f"{path} cannot be written: its folder does not exist. Create it, or choose another name.")
    with as_output_error(path):
        if os.path.lexists(path) and not (path.is_file() and _may_be_replaced(path)):
            raise OutputError(f"{path} is not a plan, and is not replaced. Choose another name for the plan.")


def _may_be_replaced(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(len(_START))
    return start in (_START, b"")


def read(path: Path) -> PlannedConversion:
    """Read a plan file.

    Raises:
        UsageError: it does not exist or cannot be read, is not a plan or was changed, or another version of streamconv
            wrote it.
    """
    try:
        return parse(read_small(path, MAX_PLAN_BYTES), path)
    except SourceMissingError:
        raise UsageError(
            f"{path}: there is no such file. Make the plan first: streamconv plan SOURCE --save {path}"
        ) from None
    except UnreadableError as error:
        raise UsageError(f"{error.reason}. Give a file that `streamconv plan --save` wrote.") from error
    except SourceError as error:
        raise UsageError(str(error)) from error


def parse(data: bytes, path: Path) -> PlannedConversion:
    """Parse the contents of the plan file at ``path``; errors as for `read`."""
    first, _, rest = data.partition(b"\n")
    try:
        header: _Header = parse_fields(_Header, parse_small_json(first[:1000]))
        if header.format != FORMAT_NAME:
            raise ValueError(f"its format is {printable(header.format)}")
    except ValueError as error:
        raise UsageError(f"{path} is not a plan ({error}). Give a file that `streamconv plan --save` wrote.") from error
    if header.format_version != FORMAT_VERSION or header.streamconv != __version__:
        raise UsageError(
            f"{path} was written by streamconv {printable(header.streamconv)}, and this is {__version__}, which may "
            "write other bytes. Make the plan again, and use one version on all machines."
        )
    if sha256(rest).hexdigest() != header.sha256:
        raise UsageError(f"{path} was changed after it was written, or is incomplete. Make the plan again.")
    recorded_line, _, plan_line = rest.partition(b"\n")
    try:
        recorded: _Recorded = parse_fields(_Recorded, json.loads(recorded_line))
        plan = plan_json.from_json(plan_line.decode())
        if plan.fingerprint != recorded.provenance.plan:
            raise ValueError("its plan has another fingerprint")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {printable(str(error))}. Make the plan again.") from error
    return PlannedConversion(
        plan, recorded.provenance, recorded.labels_from, recorded.has_checksums, recorded.server_side_copy
    )
