"""Refuses wrong options of a verification before hours of work, and starts what runs the models."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

from streamconv.files.address import local_path
from streamconv.jobs.options import VerificationOptions
from streamconv.progress import Progress
from streamconv.verification.preflight import check_image, check_packages, check_reference, check_report
from streamconv.verification.process import ModelOptions, ModelRunner, start_models


def check_options(options: VerificationOptions, runs_models: bool = True) -> None:
    """Refuse invalid options before hours of work.

    Raises:
        UsageError: torch or another package that models need is not installed, or there is no such image or folder.
        OutputError: the report cannot be written.
    """
    if options.image is not None:
        check_image(options.image)
    check_reference(options.reference)
    if runs_models or _can_be_wrong(options):
        check_packages()
    if options.report is not None:
        check_report(local_path(options.report, "report"))


def _can_be_wrong(options: VerificationOptions) -> bool:
    """Return whether the options name something that may not exist, which only torch and Pillow can find out."""
    return options.device not in ("auto", "cpu") or options.image is not None or options.reference != "builtin"


@contextmanager
def started_models(options: VerificationOptions, progress: Progress) -> Iterator[ModelRunner]:
    """Start what runs the models, which takes seconds, and end it with the ``with`` statement.

    If the options name something that may not exist, wait until it is known to exist.

    Raises:
        UsageError: it does not, or torch cannot be started.
    """
    image = None if options.image is None else os.fspath(options.image)
    # A string may stand for the code of the original model; a path never does.
    reference = options.reference if isinstance(options.reference, str) else os.path.abspath(options.reference)
    with closing(start_models(ModelOptions(options.device, image, reference))) as models:
        if _can_be_wrong(options):
            models.wait_until_ready(progress)
        yield models


def check_names(options: VerificationOptions, progress: Progress) -> None:
    """Check that the device, the image and the reference exist, for a job that runs no models.

    Raises:
        UsageError: one of them does not.
    """
    if _can_be_wrong(options):
        with started_models(options, progress):
            pass
