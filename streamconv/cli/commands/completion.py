"""``streamconv completion``."""

import click
from click.shell_completion import get_completion_class

from streamconv.cli.command import Argument, command
from streamconv.cli.terminal import Printer, print_script

SHELL = Argument(
    "shell", metavar="bash|zsh|fish", type=click.Choice(["bash", "zsh", "fish"]), group="General",
    text="The shell to print the script for.",
)  # fmt: skip


@command(SHELL)
def completion(printer: Printer, shell: str) -> None:
    """Print the script with which a shell completes commands, options, models and files.

    \b
    bash: echo 'eval "$(streamconv completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(streamconv completion zsh)"' >> ~/.zshrc
    fish: streamconv completion fish > ~/.config/fish/completions/streamconv.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    program = click.get_current_context().find_root().command
    print_script(kind(program, {}, "streamconv", "_STREAMCONV_COMPLETE").source())
