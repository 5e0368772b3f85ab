"""Verification of an output in a store: no models are run, so neither torch nor a copy is needed."""

import sys

from streamconv._version import __version__
from streamconv.errors import UsageError
from streamconv.jobs.options import VerificationOptions
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
