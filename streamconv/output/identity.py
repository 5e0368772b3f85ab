"""Decides whether two conversions are the same, by their options and whatever identifies their sources."""

from collections.abc import Sequence
from dataclasses import replace

from streamconv.files.base import UNVERSIONED
from streamconv.output.manifest import Provenance


def differences(one: Provenance, other: Provenance) -> list[str]:
    """List which of the files and decisions that make up a conversion differ between two of them."""
    found = [
        role
        for role in one.source.keys() | other.source.keys()
        if role not in one.source or role not in other.source or not one.source[role].is_same(other.source[role])
    ]
    if one.plan != other.plan:
        found.append("plan (its names, its selection, its shard size, its dtype)")
    if _chosen_labels(one) != _chosen_labels(other):
        found.append("list of labels")
    if one.image_processor != other.image_processor:
        found.append("image processor")
    return sorted(found)


def shown_differences(found: Sequence[str]) -> str:
    """Return what `differences` found as a clause, such as "backbone and list of labels differ"."""
    return f"{' and '.join(found)} differ{'s' if len(found) == 1 else ''}"


def is_unidentified(one: Provenance, other: Provenance) -> bool:
    """Return whether two conversions differ only in the versions of files, for which a server sent none at least once.

    Then only a comparison of bytes can show whether the files are the same.
    """
    unversioned = {role for each in (one, other) for role, file in each.source.items() if UNVERSIONED in file.version}

    def comparable(each: Provenance) -> Provenance:
        files = {role: replace(file, version={}) if role in unversioned else file for role, file in each.source.items()}
        return replace(each, source=files)

    return bool(unversioned and differences(one, other)) and not differences(comparable(one), comparable(other))


def _chosen_labels(provenance: Provenance) -> str | None:
    """Return the sha256 of labels that the user gave. Default ones depend on the network, which does not matter."""
    labels = provenance.labels
    return labels.sha256 if labels is not None and not labels.is_default else None
