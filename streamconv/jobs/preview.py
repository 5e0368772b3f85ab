"""Checks what a conversion would do, without doing it: nothing is written, and no weight is read."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamconv.hub.card import CARD_NAME
from streamconv.hub.destination import PushTarget
from streamconv.jobs.conversion import PreparedConversion
from streamconv.jobs.convert_to_hub import refuse_finished
from streamconv.jobs.model_options import check_names
from streamconv.jobs.options import ConversionOptions, PushOptions, StrPath, VerificationOptions
from streamconv.jobs.prepare import PreparedSource, local_copy, prepared_source
from streamconv.jobs.push_target import open_repository
from streamconv.jobs.run import check_requests
from streamconv.output.disk import require_writable
from streamconv.output.finished import EarlierOutput, Loss
from streamconv.output.folder import check_output_folder
from streamconv.output.identity import differences
from streamconv.output.journal import JOURNAL_NAME, Journal
from streamconv.output.manifest import MANIFEST_NAME
from streamconv.output.open_journal import require_unlocked_journal
from streamconv.output.ownership import owned_names
from streamconv.planning.plan import Plan
from streamconv.planning.repeats import refuse_repeats
from streamconv.progress import Progress, ignore_progress
from streamconv.source.resolve import default_output

_ONLY_BYTES = "finished if the source has not changed: its server reports no version, so the bytes will be compared"


@dataclass(frozen=True)
class Preview:
    """The steps that a conversion would take: read, download, write, verify and push, in this order.

    ``sources`` are the sizes in bytes of the files that would be read, by location; ``downloads`` those of the files
    that would be fetched into torch.hub's cache, by path. ``files`` are the sizes of the files that would be written,
    by name, empty if the conversion is finished. An interrupted run has already written ``resumed_bytes`` of them.
    ``replaced`` are the names of files that would be deleted first, and ``lost_edits`` those of them that were changed
    after the conversion. ``edited`` are such files that would be kept, and ``restored`` files of a finished conversion
    that are "missing" or "incomplete" and would be written again. ``push`` is the repository on the Hub;
    ``unverified``: it would be pushed to even if verification does not pass.
    """

    plan: Plan
    output: Path
    sources: Mapping[str, int]
    downloads: Mapping[Path, int]
    files: Mapping[str, int]
    resumed_bytes: int
    replaced: tuple[str, ...]
    verification: VerificationOptions | None
    push: PushTarget | None
    unverified: bool
    edited: tuple[str, ...] = ()
    restored: Mapping[str, Loss] = field(default_factory=dict)
    lost_edits: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the preview for JSON."""
        check = self.verification
        return {
            "dry_run": True,
            **self.plan.names,
            "architecture": self.plan.architecture,
            "read": [{"file": where, "bytes": size} for where, size in self.sources.items()],
            "download": [{"file": str(path), "bytes": size} for path, size in self.downloads.items()],
            "output": str(self.output),
            "write": [{"file": name, "bytes": size} for name, size in self.files.items()],
            "resumed_bytes": self.resumed_bytes,
            "replace": self.replaced,
            "edited": self.edited,
            "restored": self.restored,
            "lost_edits": self.lost_edits,
            "verify": None
            if check is None
            else {"device": check.device, "reference": os.fspath(check.reference), "parity": check.parity},
            "push": self.push.as_dict() if self.push is not None else None,
            "notes": self.plan.notes,
            "skipped": [str(each) for each in self.plan.skipped],
        }


def preview(
    source: StrPath,
    output: StrPath | None,
    options: ConversionOptions,
    verification: VerificationOptions | None,
    push: PushOptions | None,
    progress: Progress = ignore_progress,
) -> Preview:
    """Check a conversion as far as that is possible without reading weights, and return what it would do.

    Raises:
        UsageError, SourceError, OutputError, HubError: the job itself would be refused with the same error.
    """
    check_requests(verification, push)
    if verification is not None:
        check_names(verification, progress)
    output = output if output is not None else default_output(source)
    downloads: Mapping[Path, int] = {}
    with ExitStack() as stack:
        prepared = stack.enter_context(prepared_source(source, options, progress, output=output, is_exact=False))
        plan, opened = prepared.plan, prepared.source
        conversion = PreparedConversion.of(prepared, output, force=options.force)
        target = _push_target(push, conversion) if push is not None else None
        is_finished = opened.has_checksums and conversion.find_finished() is not None
        if opened.is_remote and not options.stream and (not is_finished or verification is not None):
            downloads = conversion.find_downloads(opened, is_finished=is_finished)
            if not downloads:  # the conversion reads the copy, so it records the copy's version
                prepared = stack.enter_context(local_copy(prepared, progress))
                conversion = PreparedConversion.of(prepared, output, force=options.force)
        if (manifest := conversion.find_unidentified()) is not None:
            conversion = conversion.with_source_of(manifest)
            plan = replace(plan, notes=(*plan.notes, f"{conversion.folder}: {_ONLY_BYTES}"))
        if options.stream and push is not None:
            refuse_finished(conversion)
        is_finished = is_finished or conversion.find_finished() is not None
        if not is_finished:
            refuse_repeats(plan.shards, is_allowed=options.allow_repeats)
        earlier = conversion.find_earlier()
        files, resumed_bytes, replaced = ({}, 0, ()) if is_finished else _written(conversion, push, options, earlier)
        return Preview(
            plan=plan,
            output=conversion.folder,
            sources=_sources(prepared),
            downloads=downloads,
            files=files,
            resumed_bytes=resumed_bytes,
            replaced=replaced,
            verification=verification,
            push=target,
            unverified=push is not None and push.unverified,
            edited=earlier.edited,
            restored=earlier.lost,
            lost_edits=conversion.find_replaced(),
        )


def _push_target(push: PushOptions, conversion: PreparedConversion) -> PushTarget:
    repository = open_repository(push, conversion.folder, conversion.provenance)
    repository.refuse_others([*conversion.plan.filenames, MANIFEST_NAME, CARD_NAME])
    return repository.target


def _sources(prepared: PreparedSource) -> dict[str, int]:
    source = prepared.source
    return {str(location): source.checkpoints[role].size for role, location in source.source.locations.items()}


def _written(
    conversion: PreparedConversion, push: PushOptions | None, options: ConversionOptions, earlier: EarlierOutput
) -> tuple[dict[str, int], int, tuple[str, ...]]:
    """Check the output folder; return the files to write, how many of their bytes exist, and the files to delete."""
    folder, plan = conversion.folder, conversion.plan
    is_staging = options.stream and push is not None  # then each shard is deleted before the next one is written
    size = max(shard.size for shard in plan.shards) if is_staging else plan.size
    require_writable(folder)
    check_output_folder(folder, conversion.provenance, plan.filenames, size, force=options.force)
    if os.path.exists(folder / JOURNAL_NAME):
        require_unlocked_journal(folder / JOURNAL_NAME, folder)
    journal = Journal.read(folder / JOURNAL_NAME)
    sizes = {shard.filename: shard.size for shard in plan.shards}
    sizes |= {name: len(data) for name, data in plan.small_files.items()}
    if plan.index is not None:
        sizes |= dict.fromkeys([name for name in plan.filenames if name not in sizes], len(plan.index))
    sizes = {name: size for name, size in sizes.items() if name not in earlier.edited}
    if earlier.manifest is not None and not earlier.is_being_written:
        return {name: size for name, size in sizes.items() if name in earlier.lost}, 0, ()
    if journal.provenance is not None and not differences(journal.provenance, conversion.provenance):
        return sizes, sum(point.size for point in journal.resume_points.values()), ()
    return sizes, 0, tuple(sorted(owned_names(folder, journal))) if options.force else ()
