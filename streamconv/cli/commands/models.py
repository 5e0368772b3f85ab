"""``streamconv models``."""

from streamconv.cli.command import JSON, command
from streamconv.cli.messages import model_lines, models_as_dict
from streamconv.cli.terminal import Printer


@command(JSON)
def models(printer: Printer) -> None:
    """List the known models with their published names and sizes."""
    printer.show(models_as_dict(), model_lines())
