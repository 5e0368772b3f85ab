"""A conversion before and after it is written: what is decided, and the result."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from streamconv._version import __version__
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.jobs.options import StrPath
from streamconv.jobs.prepare import PreparedSource, output_folder
from streamconv.output.disk import require_space, require_writable
from streamconv.output.folder import growth
from streamconv.output.manifest import Labels, Manifest, Provenance, WrittenFile
from streamconv.output.ownership import find_finished
from streamconv.planning.plan import Plan
from streamconv.source.download import check_downloads
from streamconv.source.labels import labels_in
from streamconv.source.open import OpenSource, read_config
from streamconv.tensors.casts import check_packages


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    ``output`` is the folder, and ``shards`` maps the names of its weight files to their sha256 in hexadecimal.
    ``was_finished``: the folder already held the same conversion, and nothing was written. ``resumed_bytes`` counts
    the bytes that an interrupted run had written and that were kept after a check. ``is_crc_checked``: every byte
    was compared with a CRC-32 of the source. ``labels_from`` describes where a classifier's labels came from.
    ``sent_to`` is the repository on the Hub that received the files, if ``output`` keeps none. ``overflow_count``
    counts values that are finite in the source and infinite in the output, because they are outside the range of
    the dtype that they were cast to. ``seconds`` is the time spent writing the files, not counting a download; it is
    0 if the folder was finished.
    """

    output: Path
    plan: Plan
    shards: Mapping[str, str]
    was_finished: bool
    resumed_bytes: int
    is_crc_checked: bool
    labels_from: str | None
    sent_to: str | None = None
    overflow_count: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "output": str(self.output) if self.sent_to is None else None,
            **self.plan.names,
            "architecture": self.plan.architecture,
            "bytes": self.plan.size,
            "shards": [
                {"file": s.filename, "bytes": s.size, "sha256": self.shards[s.filename]} for s in self.plan.shards
            ],
            "was_finished": self.was_finished,
            "resumed_bytes": self.resumed_bytes,
            "is_crc_checked": self.is_crc_checked,
            "labels_from": self.labels_from,
            "cast": self.plan.cast,
            "notes": self.plan.notes,
            "skipped": [str(each) for each in self.plan.skipped],
            "overflow_count": self.overflow_count,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class PreparedConversion:
    """A conversion before anything is written."""

    folder: Path
    plan: Plan
    provenance: Provenance
    labels_from: str | None
    has_checksums: bool
    force: bool

    @classmethod
    def of(cls, prepared: PreparedSource, output: StrPath | None, *, force: bool) -> "PreparedConversion":
        """Prepare the conversion of an open source.

        Raises:
            UsageError: see `output_folder`; or a package that casts need is not installed.
        """
        if prepared.plan.cast is not None:
            check_packages()
        folder, plan, source = output_folder(output, prepared, force=force), prepared.plan, prepared.source
        labels = Labels(prepared.labels_from, prepared.are_labels_default, plan.labels_digest)
        provenance = Provenance(
            source=source.describe(),
            plan=plan.fingerprint,
            **plan.names,
            select=source.source.select,
            num_heads=source.source.num_heads,
            filled=plan.filled,
            block_chunks=plan.block_chunks,
            notes=plan.notes,
            skipped=tuple(str(each) for each in plan.skipped),
            labels=labels if "id2label" in plan.config else None,
        )
        return cls(folder, plan, provenance, prepared.labels_from, source.has_checksums, force)

    def find_downloads(self, source: OpenSource, *, is_finished: bool = False) -> dict[Path, int]:
        """Return the files that must be downloaded first, with their sizes in bytes; see `check_downloads`.

        Args:
            is_finished: The output is written already.

        Raises:
            OutputError: the cache or the folder cannot be written, or their disks are too full.
        """
        output = None
        if not is_finished:
            require_writable(self.folder)
            output = self.folder, growth(self.folder, self.plan.filenames, self.plan.size, force=self.force)
            require_space(*output)
        return check_downloads(source.source, source.checkpoints, output)

    def find_finished(self) -> Conversion | None:
        """Return the result of the same conversion, if the folder already holds it and it must not be replaced.

        Raises:
            OutputError: the folder holds something else.
        """
        if self.force:
            return None
        manifest = find_finished(self.folder, self.provenance, self.plan.filenames)
        if manifest is None:
            return None
        written = {shard.filename: manifest.files[shard.filename] for shard in self.plan.shards}
        plan, labels = self.plan, manifest.labels
        if labels is not None and labels.sha256 != plan.labels_digest:  # default labels, from another origin than now
            own = labels_in(read_config(self.folder))
            plan = plan.with_labels(own) if len(own) == len(plan.config["id2label"]) else plan
        result = self.result(written, 0)
        return replace(result, plan=plan, was_finished=True, labels_from=labels.origin if labels is not None else None)

    def result(
        self, written: Mapping[str, WrittenFile], resumed_bytes: int, seconds: float = 0.0, sent_to: str | None = None
    ) -> Conversion:
        """Return the result once all weight files are ``written``."""
        return Conversion(
            output=self.folder,
            plan=self.plan,
            shards={name: file.sha256 for name, file in written.items()},
            was_finished=False,
            resumed_bytes=resumed_bytes,
            is_crc_checked=self.has_checksums,
            labels_from=self.labels_from,
            sent_to=sent_to,
            overflow_count=sum(file.overflow_count for file in written.values()),
            seconds=seconds,
        )

    def manifest(self, written: Mapping[str, WrittenFile]) -> Manifest:
        """Return the manifest once all weight files are ``written``; nothing is verified yet."""
        plan = self.plan
        index = {INDEX_NAME: plan.index} if plan.index is not None else {}
        small = {**plan.small_files, **index}.items()
        return Manifest.of(
            self.provenance,
            architecture=plan.architecture,
            files={**written, **{name: WrittenFile(len(data), sha256(data).hexdigest()) for name, data in small}},
            is_crc_checked=self.has_checksums,
            cast={"from": plan.cast["from"], "to": plan.cast["to"]} if plan.cast else None,
            versions={"streamconv": __version__, "python": platform.python_version()},
        )
