"""Describes files in formats that streamconv does not read."""

from collections.abc import Collection

from streamconv.files.address import Address
from streamconv.files.base import File
from streamconv.files.local import LocalFile
from streamconv.formats.foreign.advice import merge_distributed
from streamconv.formats.foreign.binary import describe_binary
from streamconv.formats.foreign.text import describe_text
from streamconv.formats.foreign.zips import is_distributed

START_BYTES = 64 << 10  # read to recognise a file


def describe(file: File) -> str:
    """Return what an open file is and what to do, as the rest of a sentence. At most `START_BYTES` are read."""
    address = file.origin if isinstance(file, LocalFile) else file.ref.location
    secrets = address.secrets if isinstance(address, Address) else []
    return describe_start(file.read(0, min(START_BYTES, file.size)), file.name, secrets)


def describe_start(start: bytes, name: str, secrets: Collection[str] = ()) -> str:
    """Describe a file by its first bytes; see `describe`.

    Args:
        start: Its first `START_BYTES` bytes, or all of it.
        name: Its name, which decides little: the first bytes do.
        secrets: What was sent to fetch it. A server may have sent it back instead of a file.
    """
    if not start:
        return "is empty: the save, copy or download was cut short. Fetch it again."
    if is_distributed(name):
        return f"is part of a distributed checkpoint (DCP) of torch. {merge_distributed()}."
    return (
        describe_text(start, name, secrets)
        or describe_binary(start, name)
        or "is not a torch.save checkpoint, a safetensors file or an .npz file."
    )
