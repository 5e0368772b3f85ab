"""The program ``streamconv``, one module per command: parse what the user typed, call one job, show its result.

Nothing else prints. Errors of the jobs and of the command line end here, as one message and an exit code.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from streamconv._version import __version__
from streamconv.cli.bugs import to_our_error
from streamconv.cli.command import SETTINGS
from streamconv.cli.commands import completion, convert, finish, models, plan, push, revert, run, synth, verify
from streamconv.cli.layout import print_unwrapped
from streamconv.cli.start import InterruptedByUser
from streamconv.cli.terminal import Printer, stdout_may_be_closed
from streamconv.errors import UsageError
from streamconv.families.near_names import did_you_mean
from streamconv.redaction import redacted

EXIT_CODES = """\b
Exit codes:
    0  success, and everything verified is correct
    1  verification found a difference
    2  wrong usage
    3  the source cannot be converted
    4  the output is missing or cannot be written
   70  a bug in streamconv: please report it
  130  interrupted"""


class Program(click.Group):
    """The group of all commands, listed in the order in which a user needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        with stdout_may_be_closed():  # click prints the help, and would exit with 1
            return super().make_context(*args, **settings)
        raise click.exceptions.Exit(0)

    def invoke(self, ctx: click.Context) -> Any:
        with stdout_may_be_closed():
            return super().invoke(ctx)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **settings: Any
    ) -> int:
        """Run a command. Exit with its exit code or, if not in standalone mode and without an error, return it."""
        words = sys.argv[1:] if args is None else list(args)
        printer = Printer(as_json="--json" in words)  # for usage errors; afterwards, as parsed
        InterruptedByUser.show_as_json = partial(
            printer.show_error_as_json, "Interrupted", "Interrupted. Run the same command again to resume.", 130
        )
        try:
            code = super().main(words, "streamconv", standalone_mode=False, obj=printer)
        except BaseException as error:
            if InterruptedByUser.was_raised:
                raise
            if isinstance(error, click.exceptions.NoArgsIsHelpError):
                print_unwrapped(error.format_message().splitlines(), sys.stderr)
                sys.exit(error.exit_code)
            if isinstance(error, click.ClickException):
                printer.fail(UsageError(_message(error)))
            if not isinstance(error, Exception):
                raise
            printer.fail(to_our_error(error, words))
        code = code if isinstance(code, int) else 0
        if standalone_mode:
            sys.exit(code)
        return code


def _message(error: click.ClickException) -> str:
    """Return a message about the command line that ends in how to fix it."""
    message = " ".join(redacted(error.format_message()).split())  # click lists missing choices on lines of their own
    if isinstance(error, click.NoSuchOption):
        from streamconv.cli.near_options import near_options  # with tables that only this error needs

        near = near_options(error.option_name, error.ctx.command) if error.ctx is not None else []
        if near:
            return f"No such option {error.option_name}. {did_you_mean(near)}"
        message = f"No such option {error.option_name}."
    if message.endswith("?"):  # a near command
        return message
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    return f"{message.rstrip('.')}. See {ctx.command_path if ctx is not None else 'streamconv'} --help."


@click.group(cls=Program, context_settings=SETTINGS, epilog=EXIT_CODES)
@click.version_option(__version__, message="streamconv %(version)s", help="Show the version and exit.")
def app() -> None:
    """Convert published checkpoints to the Hugging Face format by streaming, and verify the result."""


for each in (
    run.run, convert.convert, verify.verify, push.push, plan.plan, finish.finish, revert.revert, models.models,
    synth.synth, completion.completion,
):  # fmt: skip
    app.add_command(each)


def main() -> None:
    """Run the command line in this process, and change its environment, warnings and logging."""
    # Libraries' progress bars would garble ours, and the checks report what transformers warns of. As a library,
    # streamconv leaves such settings to its caller.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", "xFormers is")  # from the code of DINOv2's authors
    logging.captureWarnings(True)  # warnings of other packages are shown like ours
    app()
