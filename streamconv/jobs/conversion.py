"""A conversion before it is written, with all decisions, and its result."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamconv.jobs.options import StrPath
from streamconv.jobs.output_location import output_folder
from streamconv.jobs.prepare import PreparedSource
from streamconv.jobs.recorded_plan import planned_conversion
from streamconv.output.disk import require_space, require_writable
from streamconv.output.fallbacks import lacks_of
from streamconv.output.finished import NOTHING, EarlierOutput, Loss, find_earlier, find_edited
from streamconv.output.folder import growth
from streamconv.output.identity import is_unidentified
from streamconv.output.manifest import Manifest, Provenance, WrittenFile
from streamconv.output.planned import PlannedConversion
from streamconv.planning.parts import Part
from streamconv.planning.plan import Plan
from streamconv.source.download import check_downloads
from streamconv.source.labels import labels_in
from streamconv.source.open import OpenSource, read_config


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    ``output`` is the folder or, in a store, its URL. ``shards`` maps the names of its weight files to their sha256 in
    hexadecimal, empty if S3 copied some of the file itself; of one ``part`` of the plan, these are only that part's,
    and nothing else was written. ``was_finished``: the folder already held the same conversion, and nothing was
    written. ``resumed_bytes`` counts the bytes that an interrupted run had written and that were kept after a check.
    ``is_crc_checked``: every byte was compared with a CRC-32 of the source. ``labels_from`` describes where a
    classifier's labels came from. ``sent_to`` is the repository on the Hub that received the files, if ``output`` keeps
    none. ``overflow_count`` counts values that are finite in the source and infinite in the output, because they are
    outside the range of the dtype that they were cast to. ``seconds`` is the time spent writing the files, not counting
    a download; it is 0 if the folder was finished.

    ``edited`` are the names of small files that were changed after an earlier run wrote them, and were kept;
    ``replaced`` are those that ``force`` wrote again. ``restored`` maps the files of a finished conversion that had to
    be written again to the reason, "missing" or "incomplete"; ``resumed_bytes`` then counts what was still there.
    ``disk_notes`` are what the output's file system lacks, such as locks, and what was done instead; they are logged,
    too.
    """

    output: Path | str
    plan: Plan
    shards: Mapping[str, str]
    was_finished: bool
    resumed_bytes: int
    is_crc_checked: bool
    labels_from: str | None
    sent_to: str | None = None
    overflow_count: int = 0
    seconds: float = 0.0
    edited: tuple[str, ...] = ()
    restored: Mapping[str, Loss] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    disk_notes: tuple[str, ...] = ()
    part: Part | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "output": str(self.output) if self.sent_to is None else None,
            **self.plan.names,
            "architecture": self.plan.architecture,
            "bytes": self.plan.size,
            "shards": [
                {"file": s.filename, "bytes": s.size, "sha256": self.shards[s.filename]}
                for s in self.plan.shards
                if s.filename in self.shards
            ],
            "part": str(self.part) if self.part is not None else None,
            "was_finished": self.was_finished,
            "resumed_bytes": self.resumed_bytes,
            "is_crc_checked": self.is_crc_checked,
            "labels_from": self.labels_from,
            "cast": self.plan.cast,
            "notes": self.plan.notes,
            "skipped": [str(each) for each in self.plan.skipped],
            "overflow_count": self.overflow_count,
            "seconds": self.seconds,
            "edited": self.edited,
            "restored": self.restored,
            "replaced": self.replaced,
            "disk_notes": self.disk_notes,
        }


@dataclass(frozen=True)
class PreparedConversion:
    """A conversion into a folder that one process writes, before anything is written."""

    folder: Path
    planned: PlannedConversion
    force: bool

    @classmethod
    def of(cls, prepared: PreparedSource, output: StrPath | None, *, force: bool) -> "PreparedConversion":
        """Prepare the conversion of an open source.

        Raises:
            UsageError: see `output_folder` and `planned_conversion`.
        """
        planned = planned_conversion(prepared)
        return cls(output_folder(output, prepared, force=force), planned, force)

    @property
    def plan(self) -> Plan:
        return self.planned.plan

    @property
    def provenance(self) -> Provenance:
        return self.planned.provenance

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

    def find_earlier(self) -> EarlierOutput:
        """Return what the folder holds of the same conversion; `NOTHING` if the user replaces it with --force.

        Raises:
            OutputError: the folder holds something else.
        """
        if self.force:
            return NOTHING
        return find_earlier(self.folder, self.provenance, self.plan.filenames, self.planned.small_files)

    def find_finished(self) -> Conversion | None:
        """Return the result of the same conversion, if the folder already holds it and it must not be replaced.

        Raises:
            OutputError: the folder holds something else.
        """
        earlier = self.find_earlier()
        if (manifest := earlier.finished) is None:
            return None
        written = {shard.filename: manifest.files[shard.filename] for shard in self.plan.shards}
        result = self.with_labels_of(manifest).result(written, 0)
        return replace(result, was_finished=True, edited=earlier.edited)

    def find_unidentified(self) -> Manifest | None:
        """Return the manifest of the folder if only a comparison of bytes can show that it is this conversion."""
        manifest = Manifest.read(self.folder) if not self.force else None
        return manifest if manifest is not None and is_unidentified(manifest, self.provenance) else None

    def with_source_of(self, manifest: Manifest) -> "PreparedConversion":
        """Return the conversion with the source that a manifest describes, which has the same bytes."""
        provenance = replace(self.provenance, source=manifest.source)
        return replace(self, planned=replace(self.planned, provenance=provenance))

    def with_labels_of(self, manifest: Manifest | None) -> "PreparedConversion":
        """Return the conversion with the labels of the finished folder, if it has other ones than would be written.

        These are default labels, from another origin than now; a list of the user's would make it another conversion.
        """
        plan, labels = self.plan, manifest.labels if manifest is not None else None
        if labels is None:
            return self
        if labels.sha256 != plan.labels_digest:
            own = labels_in(read_config(self.folder))
            if len(own) != len(plan.config["id2label"]):
                return self
            plan = plan.with_labels(own)
        provenance = replace(self.provenance, labels=labels)
        planned = replace(self.planned, plan=plan, provenance=provenance, labels_from=labels.origin)
        return replace(self, planned=planned)

    def find_replaced(self) -> tuple[str, ...]:
        """Return the names of edited files that --force will replace."""
        manifest = Manifest.read(self.folder) if self.force else None
        return tuple(sorted(find_edited(self.folder, manifest.files))) if manifest is not None else ()

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
            is_crc_checked=self.planned.has_checksums,
            labels_from=self.planned.labels_from,
            sent_to=sent_to,
            overflow_count=sum(file.overflow_count for file in written.values()),
            seconds=seconds,
            disk_notes=lacks_of(self.folder),
        )
