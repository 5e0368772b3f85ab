"""The first steps of every job: resolve what the user typed, open each index, and make the plan, each of them once.

Download, writing, verification and publishing share the result.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from streamconv.errors import ChangedError, NetworkError, NoRangesError, SourceError, UsageError
from streamconv.families.base import Model
from streamconv.files.address import Address, Location
from streamconv.jobs.options import ConversionOptions, StrPath
from streamconv.jobs.own_image_processor import own_image_processor
from streamconv.logs import logger
from streamconv.output.ownership import files_with_journals
from streamconv.planning.make import make_plan
from streamconv.planning.plan import Plan
from streamconv.progress import Progress
from streamconv.source.authors import compute_digests
from streamconv.source.cache import download_path
from streamconv.source.copies import offline_copies
from streamconv.source.deciding_values import read_summaries
from streamconv.source.download import downloaded
from streamconv.source.labels import imagenet_labels, labels_in, read_labels
from streamconv.source.open import OpenSource, open_source, read_config
from streamconv.source.resolve import Source, resolve_source
from streamconv.source.small_files import remember_small_files
from streamconv.tensors.expressions import Record

_log = logger(__name__)


@dataclass(frozen=True)
class PreparedSource:
    """An open source and the plan of its conversion.

    ``labels_from`` describes the origin of a classifier's labels, and ``image_processor_from`` that of an image
    processor that the user gave.
    """

    source: OpenSource
    plan: Plan
    labels_from: str | None = None
    are_labels_default: bool = True
    image_processor_from: str | None = None

    @property
    def named_model(self) -> Model | None:
        """The published model that the user or the file's name refers to; equal shapes alone do not make it one."""
        return self.plan.model if self.plan.is_published else None


@contextmanager
def prepared_source(
    source: StrPath,
    options: ConversionOptions,
    progress: Progress,
    *,
    output: StrPath | None = None,
    is_exact: bool = True,
    labels_of: Location | None = None,
    synthetic: Model | None = None,
) -> Iterator[PreparedSource]:
    """Resolve ``source``, open its indexes and make the plan. No weight is read.

    A remote source that has to be downloaded is read only as far as the plan requires; `local_copy` downloads it.

    Args:
        output: The folder that the source is, or was, converted into; see `resolve_source`.
        is_exact: The weights will be read from this source. Otherwise, a remote index takes fewer requests.
        labels_of: A folder that was converted from the source; the plan keeps its labels, and the image processor that
            the user gave it.
        synthetic: The model that random weights were generated for; the output's manifest will record that.

    Raises:
        UsageError, SourceError: the source does not exist or cannot be converted.
    """
    resolved = resolve_source(source, options.head, options.select, options.num_heads, output=output)
    resolved = replace(resolved, head_select=options.head_select)
    if synthetic is not None:
        resolved = replace(resolved, model=synthetic, is_synthetic=True)
    _refuse_parts(resolved)
    with ExitStack() as stack:
        try:
            opened = _open_indexes(resolved, options, progress, stack, is_exact=is_exact)
        except NetworkError as error:
            copies = offline_copies(resolved)
            if copies is None:
                raise
            _log.warning("%s Using the copy that was downloaded before: %s", error, copies.backbone)
            opened = stack.enter_context(open_source(copies, is_offline=True))
        if is_exact:
            digests = compute_digests(opened.checkpoints, progress)
            opened = replace(opened, source=replace(opened.source, digests=digests))
        yield _plan(opened, options, labels_of, progress)


def _refuse_parts(source: Source) -> None:
    """Refuse a folder as a source that is still being written in parts.

    Raises:
        SourceError
    """
    folder = source.backbone
    if isinstance(folder, Path) and os.path.isdir(folder) and files_with_journals(folder):
        raise SourceError(f"{folder} is being written in parts. Finish it first: `streamconv finish DIR --plan FILE`.")


def _open_indexes(
    source: Source, options: ConversionOptions, progress: Progress, stack: ExitStack, *, is_exact: bool
) -> OpenSource:
    """Open the source's indexes; a file whose index cannot be read alone is downloaded for that."""
    if not source.is_remote or (options.stream and is_exact):
        return stack.enter_context(open_source(source))
    try:
        return stack.enter_context(open_source(source, read_local_headers=False))
    except NoRangesError:
        if options.stream or not is_exact:
            raise
        local, checkpoints = downloaded(source, progress, stack)
        opened = stack.enter_context(open_source(local, opened=checkpoints))
        _remember(opened, source)
        return opened


def _remember(opened: OpenSource, source: Source) -> None:
    """Keep the small files beside a remote backbone where its copy is, or will be."""
    if isinstance(source.backbone, Address):
        remember_small_files(opened.selection, download_path(source.backbone))


@contextmanager
def local_copy(prepared: PreparedSource, progress: Progress) -> Iterator[PreparedSource]:
    """Download the source's remote files, and open the copy with the same plan. A local source is returned as it is.

    Raises:
        SourceError: a file cannot be fetched, arrived damaged, or has changed since its index was read.
        OutputError: torch.hub's cache cannot be written.
    """
    remote = prepared.source
    if not remote.is_remote:
        yield prepared
        return
    with ExitStack() as stack:
        _remember(remote, remote.source)  # first, so that a complete copy has all of its files
        source, checkpoints = downloaded(remote.source, progress, stack, remote.checkpoints)
        local = stack.enter_context(open_source(source, opened=checkpoints, reads_small_files=False))
        yield replace(prepared, source=local, plan=prepared.plan.with_records(_records_in_copy(remote, local)))


def _records_in_copy(source: OpenSource, copy: OpenSource) -> dict[Record, Record]:
    """Map each record of ``source`` to that of its copy."""
    if source.tensors.keys() != copy.tensors.keys():
        raise ChangedError(f"{source.where} was changed after its index was read. Run the same command again.")
    return {
        old.record: new.record
        for name, tensor in source.tensors.items()
        for old, new in zip(tensor.leaves(), copy.tensors[name].leaves(), strict=True)
    }


def _plan(
    source: OpenSource, options: ConversionOptions, labels_of: Location | None, progress: Progress
) -> PreparedSource:
    labels: Sequence[str] | None = None
    labels_from, head = None, source.selection.family.classifier_head
    own = source.selection.config  # whose labels the plan keeps as they are, unless it gets others
    if source.classes is None:
        if options.labels is not None:
            raise UsageError("Only a classifier has labels. Choose a model with a head, or give its --head.")
    elif labels_of is not None:
        kept = labels_in(read_config(labels_of))
        # A wrong number is left for verification to report.
        labels = kept if len(kept) == source.classes and kept != labels_in(own) else None
    elif options.labels is not None:
        labels, labels_from = read_labels(Path(options.labels)), Path(options.labels).name
    elif "id2label" in own:
        labels_from = "the source's config.json"
    elif head is not None and source.classes == head.imagenet_classes:
        progress("asking the Hub for ImageNet's labels", 0, 1, "steps")
        labels, labels_from = imagenet_labels()
    own_processor = own_image_processor(options, labels_of)
    plan = make_plan(
        source.tensors,
        source.where,
        labels,
        options.max_shard_bytes,
        model=source.source.model,
        dtype=options.dtype,
        num_heads=source.source.num_heads,
        image_processor=own_processor,
        selection=source.selection,
        filename=source.source.backbone.name,
        summaries=read_summaries(source.selection, source.tensors, source.checkpoints["backbone"].reader),
    )
    chosen = [checkpoint.note for checkpoint in source.checkpoints.values() if checkpoint.note]
    plan = replace(plan, notes=(*chosen, *plan.notes, *source.notes))
    origin = own_processor.origin if own_processor is not None else None
    return PreparedSource(source, plan, labels_from, options.labels is None, origin)
