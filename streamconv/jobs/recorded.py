"""Reads from a folder the decisions that its verification needs and that neither the user nor the source states."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import get_args

from streamconv.display import printable
from streamconv.files.address import Location
from streamconv.jobs.options import ConversionOptions, SourceOptions
from streamconv.jobs.prepare import PreparedSource
from streamconv.output.manifest import MANIFEST_NAME, Manifest, Provenance
from streamconv.source.labels import labels_in
from streamconv.source.open import read_config
from streamconv.tensors.info import CastDtype


def recorded_options(folder: Location, given: SourceOptions) -> ConversionOptions:
    """Return the options that the folder was converted with, as far as its files show them, overridden by ``given``."""
    recorded, dtype = _recorded(folder), read_config(folder).get("dtype")
    return ConversionOptions(
        head=given.head,
        select=given.select if given.select is not None else recorded.select,
        head_select=given.head_select if given.head_select is not None else recorded.head_select,
        num_heads=given.num_heads if given.num_heads is not None else recorded.num_heads,
        stream=given.stream,
        dtype=dtype if dtype in get_args(CastDtype) else None,
    )


def with_recorded_as_unproved(prepared: PreparedSource, folder: Location, given: SourceOptions) -> PreparedSource:
    """Add the decisions that only the folder states to those that the plan lists as unproved.

    The author of the folder could have written a manifest that matches wrong files.
    """
    recorded = _recorded(folder)
    labels = labels_in(read_config(folder)) if "id2label" in prepared.plan.config else []
    unproved = _taken_from_manifest(prepared, recorded, labels, given)
    return replace(prepared, plan=replace(prepared.plan, unproved=(*prepared.plan.unproved, *unproved)))


def _recorded(folder: Location) -> Provenance:
    return Manifest.read(folder) or Provenance(source={}, plan="")


def _taken_from_manifest(
    prepared: PreparedSource, recorded: Provenance, labels: Sequence[str], given: SourceOptions
) -> Iterator[str]:
    plan, own = prepared.plan, prepared.source.selection.config
    heads, taken = plan.family.attention_heads, f"taken from {MANIFEST_NAME}"
    if recorded.num_heads is not None and given.num_heads is None and heads and not heads.is_published(plan.dimensions):
        yield f"the number of attention heads ({recorded.num_heads}) is {taken}: give --num-heads if you know it"
    if recorded.select is not None and given.select is None:
        yield f"the prefix {printable(recorded.select)} is {taken}: give --select if you know it"
    if recorded.head_select is not None and given.head_select is None:
        yield f"the head's prefix {printable(recorded.head_select)} is {taken}: give --head-select if you know it"
    if prepared.image_processor_from is not None:
        yield f"the image processor is {taken}"
    if labels != labels_in(own) and labels:
        yield f"the labels are {taken}"
