"""The load rung: transformers builds the model and finds every tensor that it wants, and no other."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import logging

from streamconv.planning.plan import Plan
from streamconv.verification.result import Check

PROVES = "transformers loads every tensor; none is missing, unexpected or misshaped"
# What it calls the lists that must be empty; "error_msgs" is left out where a version has none.
LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def check_load(folder: Path, plan: Plan) -> tuple[Check, Any]:
    """Load ``folder`` as its user will, and give the model. A load that only logs its missing tensors does not pass."""
    try:
        model, info = _load_model(folder, plan)
    except Exception as error:  # whatever transformers makes of a wrong folder is the finding
        return Check("load", False, PROVES, (f"{type(error).__name__}: {error}",)), None
    problems = [f"{kind}: {name}" for kind in LISTS for name in sorted(map(str, info.get(kind, ())))]
    return Check("load", not problems, PROVES, tuple(problems), {"parameters": model.num_parameters()}), model


def _load_model(folder: Path, plan: Plan) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' loading report.

    Its weights stay mapped from the file: a CPU needs no memory for them but the page cache.
    """
    is_classifier = "Classification" in plan.architecture
    auto = transformers.AutoModelForImageClassification if is_classifier else transformers.AutoModel
    with quiet_transformers():
        model, info = auto.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype="auto", attn_implementation="sdpa"
        )
    return model, info


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bar, beside which ours could not be read, and its advice; the rungs judge what it does."""
    was_enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
