"""The places of downloaded files in torch.hub's cache, and the records of where they came from.

torch.hub names a copy after the last part of its URL, so the first model.safetensors would hide all others. Published
models stay where torch.hub looks for them. The copy of any other file has a folder of its own in the same cache, so
that TORCH_HOME and XDG_CACHE_HOME apply to it, too. The folder is named after the host and a hash of the address:

    hub/checkpoints/dinov2_vits14_pretrain.pth
    hub/checkpoints/streamconv/huggingface.co-5a1f0c9e2b7d4836/model.safetensors

A hidden record names a file's address and the server's name for this version of it. The record is beside the file or,
for a file where torch.hub looks, in hub/checkpoints/streamconv. It is written after the file and deleted before the
file is replaced. Other programs may replace the file, too, so a record counts only if the file has its size and times.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from streamconv.errors import SourceError, UsageError
from streamconv.families.registry import published_files
from streamconv.files.address import Address, hf_to_https
from streamconv.files.local import read_small
from streamconv.formats.limits import parse_small_json
from streamconv.formats.typed_json import parse
from streamconv.output.files import as_output_error, make_folder, sync_folder, write_file

MAX_VERSIONS = 10  # servers of one file that name its version differently
_MAX_NAME_BYTES = 150  # file systems allow 255; the names of the journal and the unfinished file are longer
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Download:
    """The record of a complete download.

    ``address`` is without secrets. ``size`` is in bytes, ``sha256`` is the file's in hexadecimal. ``versions`` are
    what the servers called this version: an ETag and a Last-Modified, or fsspec's key. ``is_crc_checked``: every record
    of the file matched its CRC-32. ``date`` is in UTC. ``is_published``: it was requested from exactly the URL at which
    its authors published it. ``modified_ns`` and ``changed_ns`` are the file's mtime and ctime in nanoseconds since
    1970; older records have none.
    """

    address: str
    size: int
    sha256: str
    versions: tuple[Mapping[str, str | int | None], ...]
    is_crc_checked: bool
    date: str
    is_published: bool = False
    modified_ns: int | None = None
    changed_ns: int | None = None

    @classmethod
    def read(cls, path: Path) -> "Download | None":
        """Read the record of the file at ``path``; None if there is none, or if the file has changed since."""
        found = cls.read_unchecked(path)
        with suppress(OSError):
            state = os.stat(path)
            if found is not None and state.st_size == found.size and found.modified_ns in (None, state.st_mtime_ns):
                return found
        return None  # the file is then downloaded again

    @classmethod
    def read_unchecked(cls, path: Path) -> "Download | None":
        """Read the record of the file at ``path``, which may have been replaced by another one.

        Only records in the cache are read: in other folders, which may come from elsewhere, they prove nothing.
        """
        if not _is_in_cache(path):
            return None
        try:
            value = parse_small_json(read_small(_record_path(path)))
            if not isinstance(value, dict) or value.get("format_version") != _FORMAT_VERSION:
                return None
            found: Download = parse(cls, value)
            return found
        except (SourceError, ValueError):
            return None

    def write(self, path: Path) -> None:
        """Write the record of the complete file at ``path``; errors as for `write_file`."""
        record, place = {"format_version": _FORMAT_VERSION, **asdict(self)}, _record_path(path)
        with as_output_error(place):
            make_folder(place.parent)
        write_file(place, (json.dumps(record, indent=2) + "\n").encode())


def forget_download(path: Path) -> None:
    """Delete the record of the file at ``path``, which is about to be replaced."""
    record = _record_path(path)
    with as_output_error(record), suppress(FileNotFoundError):
        record.unlink()
        sync_folder(record.parent)


def _is_in_cache(path: Path) -> bool:
    cache, folder = Path(os.path.realpath(torch_hub_cache())), Path(os.path.realpath(path.parent))
    return folder == cache or cache / "streamconv" in folder.parents


def _record_path(path: Path) -> Path:
    folder = path.parent
    if os.path.realpath(folder) == os.path.realpath(torch_hub_cache()):
        folder = torch_hub_cache() / "streamconv"
    return folder / f".{path.name}.streamconv-download.json"


def torch_hub_cache() -> Path:
    """Return the folder in which torch.hub keeps checkpoints (https://docs.pytorch.org/docs/stable/hub.html).

    It begins with "~" if the user has no home folder: HOME is not set, and the system does not know the user.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(os.path.expanduser(home)) / "hub" / "checkpoints"


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
    """Return where the file at ``address`` is downloaded to.

    Raises:
        UsageError: the user has no home folder.
    """
    path = torch_hub_path(address)
    if path.parts[0] == "~":
        raise UsageError("There is no home folder to download into: set HOME or TORCH_HOME, or use --stream.")
    return path if is_published(address) and not os.path.lexists(path) else own_path(address)


def is_published(address: Address) -> bool:
    """Return whether this is the URL at which authors published a file, spelled as they did.

    Another spelling may lead to another file: over http instead of https, anyone on the network can replace it.
    """
    return any(file.url == address.url for file in published_files())


def _short(name: str) -> str:
    """Return a file name that is short enough, with its suffix."""
    return name.encode()[-_MAX_NAME_BYTES:].decode(errors="ignore")
