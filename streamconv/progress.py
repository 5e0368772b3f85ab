"""The callback by which jobs report progress, and how its exceptions reach the caller. Nothing here prints."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

from streamconv.arguments import checked
from streamconv.display import visible

P = ParamSpec("P")
R = TypeVar("R")

ProgressUnit = Literal["bytes", "steps"]


class Progress(Protocol):
    """A callback to which a job reports its progress. Any function with these parameters can be one:

    >>> def show(step: str, done: int, total: int, unit: str) -> None:
    ...     print(f"{step}: {done:,} of {total:,} {unit}")

    It is called in the thread that called the job, one call at a time, and the job waits until it returns. It is called
    after every few MB that are read or written, hundreds of times a second, and before and after each layer of a model
    that runs, so it should return within microseconds. It is not called while torch is imported, a file is uploaded to
    the Hub, the weights of a layer arrive over a network, or a broken connection is retried; such a gap lasts at most a
    few minutes.

    An exception that it raises ends the job and reaches the job's caller unchanged: see `streamconv.Cancelled`.
    """

    def __call__(self, step: str, done: int, total: int, unit: ProgressUnit, /) -> None:
        """Receive a report.

        Args:
            step: The current step in words, such as "writing model.safetensors": one line that is safe to print.
            done: The part of the step that is done. A step that cannot be measured reports 0 of 1, once.
            total: The value of ``done`` at which the step is complete.
            unit: The unit of ``done`` and ``total``.
        """


def ignore_progress(step: str, done: int, total: int, unit: ProgressUnit, /) -> None:
    """Ignore a report. This is the default callback of functions that report progress."""


class _Raised(BaseException):
    """Carries a callback's exception past the ``except`` clauses between the callback and the job's caller.

    A check treats an `Exception` as a wrong output, a file treats an `OSError` as a failing disk, and so on. None of
    them must do so with a callback's exception.
    """

    def __init__(self, error: Exception):
        self.error = error


def job(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that exceptions of ``progress`` and ``on_result`` reach its caller unchanged.

    Its arguments are checked first: see `checked`.
    """

    @checked
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in {"progress", "on_result"} & kwargs.keys():
            kwargs[name] = _carrying(kwargs[name])
        try:
            return function(*args, **kwargs)
        except _Raised as raised:
            error = raised.error
        try:
            raise error  # here, so that the carrier does not become its context
        finally:
            del error  # its traceback refers to this frame

    return call


def _carrying(callback: Any) -> Callable[..., None]:
    def call(*args: Any) -> None:
        try:
            callback(*(visible(each) if isinstance(each, str) else each for each in args))
        except Exception as error:
            raise _Raised(error) from None

    return call
