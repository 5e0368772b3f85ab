"""Remembers which outputs were made from their authors' own files, or were compared with them, on this machine.

A folder may come from somebody else, with any claim in its manifest. What a model card says about its authors must have
been seen here. So a small record in the cache names the sources of an output by the sha256 of its weight files:

    hub/checkpoints/streamconv/outputs/5a1f0c9e2b7d4836….json
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

from streamconv.errors import OutputError, SourceError
from streamconv.files.local import read_small
from streamconv.logs import logger
from streamconv.output.files import as_output_error, make_folder, write_file
from streamconv.output.manifest import Manifest, Provenance, SourceFile, WrittenFile, is_weights
from streamconv.output.typed_json import parse
from streamconv.source.cache import torch_hub_cache

_log = logger(__name__)


@dataclass(frozen=True)
class _Output:
    """The names and fingerprints of an output's sources by role."""

    source: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, source: Mapping[str, SourceFile]) -> "_Output":
        return cls({role: (file.file, file.fingerprint) for role, file in source.items()})


def remember_output(source: Mapping[str, SourceFile], files: Mapping[str, WrittenFile]) -> None:
    """Record that ``files`` have the weights of ``source``, if that is its authors' own."""
    if not all(file.published for file in source.values()):
        return
    path = _record_path(files)
    try:
        with as_output_error(path):
            make_folder(path.parent)
        write_file(path, json.dumps(asdict(_Output.of(source))).encode())
    except OutputError as error:
        _log.info("%s A later push will not know whose weights these are.", error)


def without_foreign_claims(manifest: Manifest) -> Manifest:
    """Return the manifest without its claims that a file is its authors' own, unless this machine remembers it."""
    if not any(file.published for file in manifest.source.values()) or _is_remembered(manifest):
        return manifest
    return replace(manifest, source={role: replace(file, published=False) for role, file in manifest.source.items()})


def with_claims_of_all(manifest: Manifest, earlier: Iterable[Provenance | None]) -> Manifest:
    """Return the manifest of an output that keeps bytes of ``earlier`` conversions, with the claims that all share.

    The earlier source may have been another file, made to have the same CRC-32s.
    """
    published = {
        role: all(each.source[role].published for each in earlier if each is not None and role in each.source)
        for role in manifest.source
    }
    source = {
        role: replace(file, published=file.published and published[role]) for role, file in manifest.source.items()
    }
    return replace(manifest, source=source)


def _is_remembered(manifest: Manifest) -> bool:
    try:
        record: _Output = parse(_Output, json.loads(read_small(_record_path(manifest.files))))
    except (SourceError, ValueError, RecursionError):
        return False
    return record == _Output.of(manifest.source)


def _record_path(files: Mapping[str, WrittenFile]) -> Path:
    weights = sorted(file.sha256 for name, file in files.items() if is_weights(name))
    return torch_hub_cache() / "streamconv" / "outputs" / f"{sha256(' '.join(weights).encode()).hexdigest()[:32]}.json"
