"""Verification of an output in a store: no models are run, so neither torch nor a copy is needed."""

import sys
from pathlib import Path

from streamconv._version import __version__
from streamconv.errors import OutputError, UsageError
from streamconv.files.address import Location
from streamconv.files.folders import exists, file_in
from streamconv.formats.safetensors import INDEX_NAME, SINGLE_NAME
from streamconv.jobs.options import VerificationOptions
from streamconv.output.journal import is_unfinished
from streamconv.output.manifest import MANIFEST_NAME
from streamconv.output.ownership import refuse_parts
from streamconv.output.readable import reading_output, require_folder, states_in_store
from streamconv.output.stores.records import CONVERSION
from streamconv.verification.result import Check, ModelResults

_REASON = "the output is in a store"
_NOT_RUN = (
    "the models were not run, because the output is in a store: to run them, copy the folder to this machine, then "
    "`streamconv verify DIR SOURCE`"
)
MODELS_NOT_RUN = ModelResults(
    tuple(Check(name, None, _REASON, not_checked=_NOT_RUN) for name in ("load", "parity", "preprocessing")),
    versions={"streamconv": __version__, "python": sys.version.split()[0]},
)
"""The results of models for an output in a store."""


def refuse_model_options(options: VerificationOptions) -> None:
    """Refuse options that decide how models are run.

    Raises:
        UsageError: names those that were given.
    """
    default = VerificationOptions()
    names = ("device", "image", "reference", "thorough")
    given = [f"--{name}" for name in names if getattr(options, name) != getattr(default, name)]
    if given:
        raise UsageError(
            f"{' and '.join(given)} cannot be used for an output in a store, with which no models are run. Omit "
            f"{'it' if len(given) == 1 else 'them'}, or copy the folder to this machine, and verify it there."
        )


def require_finished(folder: Location) -> None:
    """Check that a folder, on this machine or in a store, may hold a finished conversion.

    Raises:
        OutputError: it does not exist, is unfinished, or cannot be accessed.
    """
    if isinstance(folder, Path):
        require_folder(folder)
        refuse_parts(folder)
        if is_unfinished(folder):
            raise OutputError(
                f"{folder} holds an unfinished conversion. Finish it first: run the same convert command again."
            )
        return
    with reading_output():
        is_being_written = exists(file_in(folder, CONVERSION))
    if is_being_written:
        raise OutputError(
            f"{folder} holds an unfinished conversion. Finish it first: run the same convert command again, or write "
            "all parts and run `streamconv finish`."
        )
    names = states_in_store(folder)
    if not names:
        raise OutputError(
            f"{folder} is not a folder in its store: no file is in it. Give a folder that streamconv wrote."
        )
    if not names.keys() & {MANIFEST_NAME, SINGLE_NAME, INDEX_NAME}:
        raise OutputError(
            f"{folder} has neither {MANIFEST_NAME} nor a complete model, so it holds something else. Give a folder "
            "that streamconv wrote."
        )
