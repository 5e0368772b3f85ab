"""The places of downloaded files in torch.hub's cache, and the records of where they came from.

torch.hub names a copy after the last part of its URL, so the first model.safetensors would hide all others. Published
models stay where torch.hub looks for them. The copy of any other file has a folder of its own in the same cache, so
that TORCH_HOME and XDG_CACHE_HOME apply to it, too. The folder is named after the host and a hash of the address:

    hub/checkpoints/dinov2_vits14_pretrain.pth
    hub/checkpoints/streamconv/huggingface.co-5a1f0c9e2b7d4836/model.safetensors

A hidden record beside it names its address and the server's name for this version of the file. The record is written
after the file and deleted before the file is replaced, so that it never describes another one.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from streamconv.errors import SourceError
from streamconv.families.registry import published_files
from streamconv.files.address import Address, hf_to_https
from streamconv.files.local import read_small
from streamconv.output.files import as_output_error, sync_folder, write_file
from streamconv.output.typed_json import parse
from streamconv.source.resolve import torch_hub_cache

MAX_VERSIONS = 10  # servers of one file that name its version differently
_MAX_NAME_BYTES = 150  # file systems allow 255; the names of the journal and the unfinished file are longer
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Download:
    """The record of a complete download.

    ``address`` is without secrets. ``size`` is in bytes, ``sha256`` is the file's in hexadecimal. ``versions`` are
    what the servers called this version: an ETag and a Last-Modified, or fsspec's key. ``is_crc_checked``: every record
    of the file matched its CRC-32. ``date`` is in UTC.
    """

    address: str
    size: int
    sha256: str
    versions: tuple[Mapping[str, str | int | None], ...]
    is_crc_checked: bool
    date: str

    @classmethod
    def read(cls, path: Path) -> "Download | None":
        """Read the record of the file at ``path``; None if there is none, or if it is of a file of another size."""
        try:
            value = json.loads(read_small(_record_path(path)))
            if not isinstance(value, dict) or value.get("format_version") != _FORMAT_VERSION:
                return None
            found: Download = parse(cls, value)
            return found if os.stat(path).st_size == found.size else None
        except (SourceError, ValueError, RecursionError, OSError):
            return None  # the file is then downloaded again

    def write(self, path: Path) -> None:
        """Write the record of the complete file at ``path``; errors as for `write_file`."""
        record = {"format_version": _FORMAT_VERSION, **asdict(self)}
        write_file(_record_path(path), (json.dumps(record, indent=2) + "\n").encode())


def forget_download(path: Path) -> None:
    """Delete the record of the file at ``path``, which is about to be replaced."""
    record = _record_path(path)
    with as_output_error(record), suppress(FileNotFoundError):
        record.unlink()
        sync_folder(record.parent)


def _record_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.streamconv-download.json")


def torch_hub_path(address: Address) -> Path:
    """Return where torch.hub, and streamconv 0.2.0, keep the file at ``address``."""
    return torch_hub_cache() / _short(address.name)


def own_path(address: Address) -> Path:
    """Return a place that no file at another address has."""
    if address.scheme == "hf":
        address = hf_to_https(address)
    digest = sha256(address.identity.encode()).hexdigest()[:16]
    host = re.sub(r"[^A-Za-z0-9.]+", "-", str(address).partition("://")[2].partition("/")[0])[:40]
    return torch_hub_cache() / "streamconv" / f"{host}-{digest}" / _short(address.name)


def download_path(address: Address) -> Path:
    """Return where the file at ``address`` is downloaded to."""
    path = torch_hub_path(address)
    return path if _is_published(address) and not os.path.lexists(path) else own_path(address)


def _is_published(address: Address) -> bool:
    return any(file.url == address.url for file in published_files())


def _short(name: str) -> str:
    """Return a file name that is short enough, with its suffix."""
    return name.encode()[-_MAX_NAME_BYTES:].decode(errors="ignore")
