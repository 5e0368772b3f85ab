"""The load check: transformers builds the model and finds exactly the tensors that it expects."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import logging

from streamconv.planning.plan import Plan
from streamconv.verification.result import Check

PROVES = "transformers loads every tensor; none is missing, unexpected or misshaped"
# Lists in transformers' loading report that must be empty. Some versions have no "error_msgs".
PROBLEM_LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def check_load(folder: Path, plan: Plan) -> tuple[Check, Any]:
    """Load ``folder`` as its user will, and return the model too, or None if it does not load.

    transformers only logs tensors that are missing or unexpected; here they fail the check.
    """
    try:
        model, info = _load_model(folder, plan)
    except Exception as error:  # whatever transformers raises is the result of the check
        return Check("load", False, PROVES, (f"{type(error).__name__}: {error}",)), None
    problems = [f"{kind}: {name}" for kind in PROBLEM_LISTS for name in sorted(map(str, info.get(kind, ())))]
    return Check("load", not problems, PROVES, tuple(problems), {"parameters": model.num_parameters()}), model


def _load_model(folder: Path, plan: Plan) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' loading report.

    The weights stay mapped from the file, so on a CPU they need no memory beyond the page cache.
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
    """Switch off transformers' progress bar, which would garble ours, and its warnings, which the checks replace."""
    had_progress_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_progress_bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
