"""Asks the user before a command downloads or writes more than the user may expect."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import click

from streamconv.cli.terminal import Printer
from streamconv.display import visible
from streamconv.errors import RepeatedDataError
from streamconv.jobs.options import ConversionOptions

Result = TypeVar("Result")


def can_ask() -> bool:
    """Return whether a person can answer a question."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def confirmed(question: str) -> bool:
    """Ask a question on stderr, and return whether the answer is yes."""
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # the input ended
        return False


def with_consent(options: ConversionOptions, printer: Printer, job: Callable[[ConversionOptions], Result]) -> Result:
    """Run a job. If its output would repeat data, ask the user, and run the job again if the answer is yes.

    Raises:
        RepeatedDataError: the answer is no, or nobody can answer.
    """
    try:
        return job(options)
    except RepeatedDataError as error:
        if printer.as_json or not can_ask():
            raise
        if not confirmed(f"{visible(error.reason)}. Write it?"):
            raise
    return job(replace(options, allow_repeats=True))
