"""Records which outputs this machine made or verified, from which sources and with which verdicts.

A folder may come from elsewhere, with any claim in its manifest. A model card may repeat claims about authors and
verification only if this machine can confirm them. So each confirmed claim is a small file in the cache, named after
the sha256 of the claim:

    hub/checkpoints/streamconv/outputs/5a1f0c9e2b7d4836….json
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from streamconv.errors import OutputError
from streamconv.logs import logger
from streamconv.output.files import as_output_error, make_folder, write_file
from streamconv.output.manifest import Manifest, Provenance, SourceFile, WrittenFile
from streamconv.source.cache import torch_hub_cache

_log = logger(__name__)


def remember_output(
    source: Mapping[str, SourceFile], files: Mapping[str, WrittenFile], *, is_remote: bool = False
) -> None:
    """Record that exactly these files were made from ``source``, or match it.

    Nothing is recorded for a source that is neither its authors' own nor ``is_remote``: no later command needs it.
    """
    if is_remote or all(file.published for file in source.values()):
        _remember(_origin(source, files))


def is_remembered(source: Mapping[str, SourceFile], files: Mapping[str, WrittenFile]) -> bool:
    """Return whether `remember_output` recorded these files with this source."""
    return _path(_origin(source, files)).is_file()


def remember_shard(source: Mapping[str, SourceFile], name: str, shard: WrittenFile) -> None:
    """Record that this process wrote all bytes of a shard from ``source``."""
    _remember({"shard": _origin(source, {name: shard})})


def is_shard_remembered(source: Mapping[str, SourceFile], name: str, shard: WrittenFile) -> bool:
    """Return whether `remember_shard` recorded this."""
    return _path({"shard": _origin(source, {name: shard})}).is_file()


def remember_verdict(verdict: Mapping[str, Any]) -> None:
    """Record that this machine reached a verdict, `Verification.as_record`, which names its files' sha256."""
    _remember({"verdict": verdict})


def is_verdict_remembered(verdict: Mapping[str, Any]) -> bool:
    """Return whether `remember_verdict` recorded exactly this verdict."""
    return _path({"verdict": verdict}).is_file()


def without_foreign_claims(manifest: Manifest) -> Manifest:
    """Return the manifest without claims that a file is its authors' own, unless this machine has confirmed them."""
    is_claimed = any(file.published for file in manifest.source.values())
    if not is_claimed or is_remembered(manifest.source, manifest.current_files):
        return manifest
    return replace(manifest, source={role: replace(file, published=False) for role, file in manifest.source.items()})


def with_claims_of_all(manifest: Manifest, earlier: Iterable[Provenance | None]) -> Manifest:
    """Return the manifest of an output that keeps bytes of ``earlier`` conversions, with the claims that all make.

    An earlier source may have been another file that was made to have the same CRC-32s.
    """
    published = {
        role: all(each.source[role].published for each in earlier if each is not None and role in each.source)
        for role in manifest.source
    }
    source = {
        role: replace(file, published=file.published and published[role]) for role, file in manifest.source.items()
    }
    return replace(manifest, source=source)


def _origin(source: Mapping[str, SourceFile], files: Mapping[str, WrittenFile]) -> dict[str, Any]:
    return {
        "source": {role: [file.file, file.fingerprint, file.published] for role, file in source.items()},
        "files": {name: file.sha256 for name, file in files.items()},
    }


def _remember(claim: Mapping[str, Any]) -> None:
    path = _path(claim)
    try:
        with as_output_error(path):
            make_folder(path.parent)
        write_file(path, _as_json(claim))
    except OutputError as error:
        _log.info("%s Later commands will treat this output as one from another machine.", error)


def _path(claim: Mapping[str, Any]) -> Path:
    return torch_hub_cache() / "streamconv" / "outputs" / f"{sha256(_as_json(claim)).hexdigest()[:32]}.json"


def _as_json(claim: Mapping[str, Any]) -> bytes:
    return json.dumps(claim, sort_keys=True).encode()
