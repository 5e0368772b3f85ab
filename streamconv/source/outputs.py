"""Remembers which outputs were made from their authors' own files, or were compared with them, on this machine.

A folder may come from somebody else, with any claim in its manifest. What a model card says about its authors must have
been seen here. So a small record in the cache names the sources of an output by the sha256 of its weight files:

    hub/checkpoints/streamconv/outputs/5a1f0c9e2b7d4836….json
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from streamconv.errors import OutputError, SourceError
from streamconv.files.local import read_small
from streamconv.logs import logger
from streamconv.output.files import as_output_error, make_folder, write_file
from streamconv.output.manifest import Manifest, SourceFile, WrittenFile, is_weights
from streamconv.output.typed_json import parse
from streamconv.source.cache import torch_hub_cache

_log = logger(__name__)


@dataclass(frozen=True)
class _Output:
    """The fingerprints of an output's sources by role."""

    source: Mapping[str, str]


def remember_output(source: Mapping[str, SourceFile], files: Mapping[str, WrittenFile]) -> None:
    """Record that ``files`` have the weights of ``source``, if that is its authors' own."""
    if not all(file.published for file in source.values()):
        return
    path, record = _record_path(files), {"source": {role: file.fingerprint for role, file in source.items()}}
    try:
        with as_output_error(path):
            make_folder(path.parent)
        write_file(path, json.dumps(record).encode())
    except OutputError as error:
        _log.info("%s A later push will not know whose weights these are.", error)


def without_foreign_claims(manifest: Manifest) -> Manifest:
    """Return the manifest without its claims that a file is its authors' own, unless this machine remembers it."""
    if not any(file.published for file in manifest.source.values()) or _is_remembered(manifest):
        return manifest
    return replace(manifest, source={role: replace(file, published=False) for role, file in manifest.source.items()})


def _is_remembered(manifest: Manifest) -> bool:
    try:
        record: _Output = parse(_Output, json.loads(read_small(_record_path(manifest.files))))
    except (SourceError, ValueError, RecursionError):
        return False
    return record.source == {role: file.fingerprint for role, file in manifest.source.items()}


def _record_path(files: Mapping[str, WrittenFile]) -> Path:
    weights = sorted(file.sha256 for name, file in files.items() if is_weights(name))
    return torch_hub_cache() / "streamconv" / "outputs" / f"{sha256(' '.join(weights).encode()).hexdigest()[:32]}.json"
