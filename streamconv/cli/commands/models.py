"""``streamconv models``."""

from streamconv.cli.command import command
from streamconv.cli.messages import model_lines
from streamconv.cli.terminal import Printer


@command()
def models(printer: Printer) -> None:
    """List the known models with their published names, sizes and files."""
    printer.show({}, model_lines())
