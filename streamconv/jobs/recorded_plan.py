"""Adds to a plan what the manifest of its output will record."""

from collections.abc import Sequence

from streamconv.display import first_lines
from streamconv.families.selection import Skipped
from streamconv.jobs.options import ConversionOptions
from streamconv.jobs.prepare import PreparedSource
from streamconv.output.manifest import GivenImageProcessor, Labels, Provenance
from streamconv.output.planned import PlannedConversion
from streamconv.tensors.packages import check_packages

MAX_RECORDED = 100  # skipped parts that a manifest lists


def planned_conversion(prepared: PreparedSource, options: ConversionOptions = ConversionOptions()) -> PlannedConversion:
    """Return the conversion of an open source, wherever it will be written.

    Raises:
        UsageError: a package that evaluating the tensors needs is not installed.
    """
    plan, source = prepared.plan, prepared.source
    check_packages({name: tensor for shard in plan.shards for name, tensor in shard.tensors})
    labels = Labels(prepared.labels_from, prepared.are_labels_default, plan.labels_digest)
    provenance = Provenance(
        source=source.describe(),
        plan=plan.fingerprint,
        **plan.names,
        select=source.source.select,
        head_select=source.source.head_select,
        num_heads=source.source.num_heads,
        guessed_heads=_guessed_heads(prepared),
        filled=plan.filled,
        block_chunks=plan.block_chunks,
        notes=plan.notes,
        skipped=_recorded(plan.skipped),
        labels=labels if "id2label" in plan.config else None,
        image_processor=_given_image_processor(prepared),
    )
    return PlannedConversion(plan, provenance, prepared.labels_from, source.has_checksums, options.server_side_copy)


def _recorded(skipped: Sequence[Skipped]) -> tuple[str, ...]:
    """Return the skipped parts as the manifest and the model card list them; a hostile source can have thousands."""
    return tuple(first_lines([str(each) for each in skipped[:MAX_RECORDED]], MAX_RECORDED, len(skipped)))


def _guessed_heads(prepared: PreparedSource) -> int | None:
    """Return the number of attention heads if it is only assumed, because it is usual; None otherwise."""
    plan, heads = prepared.plan, prepared.plan.family.attention_heads
    is_stated = heads is None or prepared.source.source.num_heads is not None or heads.is_published(plan.dimensions)
    return None if is_stated else plan.assumed_heads


def _given_image_processor(prepared: PreparedSource) -> GivenImageProcessor | None:
    origin, config = prepared.image_processor_from, prepared.plan.image_processor
    return GivenImageProcessor(origin, config) if origin is not None and config is not None else None
