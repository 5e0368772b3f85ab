"""``streamconv revert``."""

import streamconv
from streamconv.cli.command import JSON, Argument, Option, command
from streamconv.cli.messages import reverted_lines
from streamconv.cli.options import FILE, REPLACE
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.terminal import Printer

FOLDER = Argument(
    "folder", metavar="DIR", type=FILE, group="Source", text="A folder with a transformers model in safetensors files."
)
OUTPUT = Option(
    "-o", "--output", metavar="FILE", type=FILE, required=True, group="Output",
    help="The file to write: .pth, .pt, .bin or .safetensors.",
)  # fmt: skip
HEAD = Option(
    "--head", metavar="FILE", type=FILE, group="Output", help="The file to write a classifier's linear head to."
)
BLOCK_CHUNKS = Option(
    "--block-chunks", metavar="N", type=int, group="Output", show_default="as before the conversion",
    help="The number of chunks to put the blocks in; 0 for one plain list.",
)  # fmt: skip


@command(FOLDER, OUTPUT, HEAD, BLOCK_CHUNKS, REPLACE, JSON)
def revert(printer: Printer, folder: str, output: str, head: str | None, block_chunks: int | None, force: bool) -> None:
    """Convert a folder back to the authors' original format."""
    with ProgressReport(printer.is_quiet) as progress:
        reverted = streamconv.revert(
            folder, output, head=head, block_chunks=block_chunks, force=force, progress=progress
        )
    printer.show(reverted.as_dict(), reverted_lines(reverted))
