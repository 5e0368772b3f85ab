"""``streamconv plan``."""

from typing import Any

import streamconv
from streamconv import ConversionOptions
from streamconv.cli.command import JSON, command
from streamconv.cli.messages import plan_lines
from streamconv.cli.options import DTYPE, HEAD, NUM_HEADS, SELECT, SHARD_SIZE, source_argument
from streamconv.cli.terminal import Printer


@command(source_argument(), HEAD, SELECT, NUM_HEADS, SHARD_SIZE, DTYPE, JSON)
def plan(printer: Printer, source: str, **conversion: Any) -> None:
    """Show what convert would write: mapping, shards, bytes. No weight is read."""
    planned = streamconv.plan(source, ConversionOptions(**conversion))
    printer.show(planned.as_dict(), plan_lines(planned))
