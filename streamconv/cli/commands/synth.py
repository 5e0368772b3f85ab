"""``streamconv synth``."""

import streamconv
from streamconv.cli.command import Argument, command
from streamconv.cli.messages import synth_lines
from streamconv.cli.options import FILE, REPLACE, SEED, model_argument
from streamconv.cli.terminal import Printer

CHECKPOINT = Argument(
    "file", metavar="FILE", type=FILE, group="Output",
    text="The checkpoint to write; a classifier's head is written next to it.",
)  # fmt: skip


@command(model_argument(), CHECKPOINT, SEED, REPLACE)
def synth(printer: Printer, model: str, file: str, seed: int, force: bool) -> None:
    """Write a checkpoint of random weights, with the names and shapes of the original model."""
    written = streamconv.synth(model, file, seed=seed, force=force)
    printer.show({}, synth_lines(written))
