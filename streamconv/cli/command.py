"""Commands, options and arguments on click, with help in groups and with the options that every command has."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import click

from streamconv.cli.terminal import Printer
from streamconv.display import visible
from streamconv.errors import UsageError

GROUPS = ("Source", "Output", "Parallel", "Verification", "Hub", "General")
FIRST_COLUMN = 26  # of the help: options with longer names have their text on the next line
SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 160,
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_shard_size is --max-shard-size
}
_ALIAS = re.compile(r", --[a-z]+_[a-z_]+")  # a name in the original conversion script
_RANGE = re.compile(r"; x>=\d(?=\])|  \[x>=\d\]")  # as click shows the least value of a number


class Option(click.Option):
    """An option that the help shows in ``group``."""

    def __init__(self, *names: str, group: str, **settings: Any):
        self.group = group
        super().__init__(names, show_default=settings.pop("show_default", True), **settings)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record is None:
            return None
        names, text = record
        text = (
            text.replace("[default: (", "[default: ").replace(")]", "]").replace("; x>=0]", "]").replace("  [x>=1]", "")
        )
        return _ALIAS.sub("", names), text


class Argument(click.Argument):
    """An argument with a line in the help; before 8.5, click shows options only."""

    def __init__(self, name: str, *, group: str, text: str, **settings: Any):
        self.group, self._text = group, text
        super().__init__([name], **settings)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.make_metavar(ctx), self._text


QUIET = Option("-q", "--quiet", is_flag=True, group="General", help="Print only errors and differences.")
VERBOSE = Option(
    "-v", "--verbose", count=True, default=0, show_default=False, group="General",
    help="Log the important steps to stderr; -vv logs all.",
)  # fmt: skip
JSON = Option(
    "--json", "as_json", is_flag=True, group="General", help="Print results and errors on stdout as one JSON object."
)


class Command(click.Command):
    """A command whose function takes a `Printer` first, and returns the exit code, or None for 0."""

    def invoke(self, ctx: click.Context) -> Any:
        printer = ctx.find_object(Printer) or Printer()
        printer.as_json = ctx.params.pop("as_json", False)
        printer.is_quiet = ctx.params.pop("quiet")
        verbosity = ctx.params.pop("verbose")
        if verbosity or not printer.is_quiet:
            _log(ctx, verbosity)
        _check_environment()
        try:
            return ctx.invoke(self.callback, printer, **ctx.params)  # type: ignore[arg-type]
        except (BrokenPipeError, EOFError, SystemExit) as error:  # a bug: click would exit with 1
            raise RuntimeError(f"{type(error).__name__} ended the command") from error

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence for the list of commands; click would cut it off at ``limit``."""
        return (self.help or "").partition(".")[0]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                records[getattr(parameter, "group", "General")].append(record)
        for group, rows in records.items():
            if rows:
                with formatter.section(group):
                    formatter.write_dl([(f"{names:{FIRST_COLUMN}}", text) for names, text in rows], FIRST_COLUMN)


def _check_environment() -> None:
    """Refuse an environment in which a command would fail later. The help does not need this check.

    Raises:
        UsageError: the current folder was deleted.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("The current folder no longer exists. Change to another one.") from None


def command(*parameters: click.Parameter, name: str | None = None) -> Callable[[Callable[..., int | None]], Command]:
    """Make a function a `Command` with these parameters, --quiet and --verbose; its help is the docstring."""

    def make(function: Callable[..., int | None]) -> Command:
        return Command(
            name or function.__name__,
            context_settings=SETTINGS,
            callback=function,
            params=[*parameters, QUIET, VERBOSE],
            help=function.__doc__,
        )

    return make


def values_of(options: Sequence[click.Parameter], given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of ``options`` among those that a command was ``given``."""
    return {option.name: given[option.name] for option in options if option.name is not None}


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record).strip())


def _log(ctx: click.Context, verbosity: int) -> None:
    """Log to stderr until the command ends: warnings; with -v also the important steps, with -vv everything."""
    logger, handler = logging.getLogger("streamconv"), logging.StreamHandler()
    loggers = (logger, logging.getLogger("py.warnings"))  # the latter: warnings of Python and other packages
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s" if verbosity else "warning: %(message)s"))
    before = logger.level

    def stop() -> None:
        for each in loggers:
            each.removeHandler(handler)
        logger.setLevel(before)

    for each in loggers:
        each.addHandler(handler)
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    ctx.call_on_close(stop)
