"""A planned conversion: all that a process needs to write its files. Pure data, which can be saved and sent."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from streamconv._version import __version__
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.output.manifest import Manifest, Provenance, WrittenFile
from streamconv.planning.plan import Plan


@dataclass(frozen=True)
class PlannedConversion:
    """A plan, and what the manifest of its output will record.

    ``labels_from`` describes the origin of a classifier's labels. ``has_checksums``: every tensor has a CRC-32 in its
    file. ``server_side_copy``: if the source is in the store that is written to, the store may copy ranges of it.
    """

    plan: Plan
    provenance: Provenance
    labels_from: str | None
    has_checksums: bool
    server_side_copy: bool = True

    @property
    def small_files(self) -> dict[str, bytes]:
        """The contents of all files except the weights and the manifest, by name."""
        plan = self.plan
        return {**plan.small_files, **({INDEX_NAME: plan.index} if plan.index is not None else {})}

    def manifest(
        self, written: Mapping[str, WrittenFile], recorded: Mapping[str, WrittenFile] | None = None
    ) -> Manifest:
        """Return the manifest once all weight files are ``written``; nothing is verified yet.

        ``recorded`` are edited files as an earlier manifest records them; they are not written again.
        """
        plan = self.plan
        small = {name: WrittenFile(len(data), sha256(data).hexdigest()) for name, data in self.small_files.items()}
        return Manifest.of(
            self.provenance,
            architecture=plan.architecture,
            files={**written, **small, **(recorded or {})},
            is_crc_checked=self.has_checksums,
            cast={"from": plan.cast["from"], "to": plan.cast["to"]} if plan.cast else None,
            versions={"streamconv": __version__, "python": sys.version.split()[0]},
        )
