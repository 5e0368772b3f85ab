"""``streamconv plan``."""

from typing import Any

import streamconv
from streamconv import ConversionOptions
from streamconv.cli.command import JSON, Option, command
from streamconv.cli.messages import plan_lines
from streamconv.cli.options import (
    DTYPE,
    HEAD,
    HEAD_SELECT,
    IMAGE_PROCESSOR_OPTIONS,
    NUM_HEADS,
    SELECT,
    SHARD_SIZE,
    source_argument,
)
from streamconv.cli.terminal import Printer

MAPPING = Option("--mapping", is_flag=True, group="General", help="Also show the mapping of every tensor.")


@command(
    source_argument(), HEAD, HEAD_SELECT, SELECT, NUM_HEADS, *IMAGE_PROCESSOR_OPTIONS, SHARD_SIZE, DTYPE, MAPPING, JSON,
)  # fmt: skip
def plan(printer: Printer, source: str, mapping: bool, **conversion: Any) -> None:
    """Show what convert would write: parameters, size, files, and what is skipped. No weights are read."""
    planned = streamconv.plan(source, ConversionOptions(**conversion))
    printer.show(planned.as_dict(), plan_lines(planned, with_mapping=mapping))
