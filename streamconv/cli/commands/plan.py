"""``streamconv plan``."""

import os
from typing import Any

import streamconv
from streamconv import ConversionOptions
from streamconv.cli.command import JSON, Option, command
from streamconv.cli.messages import plan_lines
from streamconv.cli.options import (
    DTYPE,
    FILE,
    HEAD,
    HEAD_SELECT,
    IMAGE_PROCESSOR_OPTIONS,
    LABELS,
    NO_SERVER_SIDE_COPY,
    NUM_HEADS,
    SELECT,
    SHARD_SIZE,
    source_argument,
)
from streamconv.cli.terminal import Printer
from streamconv.cli.units import size

MAPPING = Option("--mapping", is_flag=True, group="General", help="Also show the mapping of every tensor.")
SAVE = Option(
    "--save", metavar="FILE", type=FILE, group="Output",
    help="Save the plan to a file for `streamconv convert --plan`, on one machine or several.",
)  # fmt: skip


@command(
    source_argument(), HEAD, HEAD_SELECT, SELECT, NUM_HEADS, LABELS, *IMAGE_PROCESSOR_OPTIONS, SHARD_SIZE, DTYPE,
    NO_SERVER_SIDE_COPY, SAVE, MAPPING, JSON,
)  # fmt: skip
def plan(
    printer: Printer, source: str, no_server_side_copy: bool, mapping: bool, save: str | None, **conversion: Any
) -> None:
    """Show what convert would write: parameters, size, files, and what is skipped. No weights are read."""
    options = ConversionOptions(**conversion, server_side_copy=not no_server_side_copy)
    planned = streamconv.plan(source, options, save=save)
    saved = [f"saved as {save}, {size(os.path.getsize(save))}"] if save is not None else []
    printer.show(planned.as_dict(), [*plan_lines(planned, with_mapping=mapping), *saved])
