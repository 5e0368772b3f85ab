"""The name of a repository if the user gives none, and the published model that an output was made from."""

import re
from pathlib import Path

from streamconv.errors import UsageError
from streamconv.families.base import Family, Model, RemoteFile
from streamconv.families.registry import all_families, find_model
from streamconv.output.manifest import Provenance, SourceFile


def published_model(provenance: Provenance) -> tuple[Family, Model] | None:
    """Return the published model that an output was made from, if all of its source files are the authors' own.

    A name that a user gave proves nothing: any file may have the name of a published one. Nor does a manifest of
    streamconv 0.2.0, which calls any file published that was found in torch.hub's cache.
    """
    try:
        family, model = find_model(str(provenance.model))
    except UsageError:
        return None
    authors = {"backbone": model.backbone, **({"head": model.head} if model.head else {})}
    if provenance.source.keys() != authors.keys():
        return None
    return (family, model) if all(_is_own(provenance.source[role], file) for role, file in authors.items()) else None


def _is_own(file: SourceFile, published: RemoteFile) -> bool:
    """Return whether a file is known to be ``published``."""
    has_its_hash = bool(published.sha256_start) and file.sha256.startswith(published.sha256_start)
    return file.published and file.file == published.filename and (file.address == published.url or has_its_hash)


def default_name(folder: Path, provenance: Provenance | None) -> str:
    """Return the name of the repository for an output: that of the published model, or else that of its folder.

    Args:
        provenance: None for random weights.

    Raises:
        UsageError: the folder has no name that a repository can have, or the name of a published model.
    """
    if provenance is not None and (published := published_model(provenance)) is not None:
        return published[1].published_name
    name = re.sub(r"[^A-Za-z0-9._-]+|-{2,}|[.]{2,}", "-", folder.absolute().name)
    name = re.sub(r"-{2,}", "-", name).strip("-.").removesuffix(".git")
    if any(name.lower() == model.published_name for family in all_families() for model in family.models):
        raise UsageError(
            f"A model was published as {name}, and these weights are not known to be its own. Name the repository, as "
            "USER/NAME or NAME."
        )
    if not name:
        raise UsageError(f"{folder} has no name for a repository. Name the repository, as USER/NAME or NAME.")
    return name
