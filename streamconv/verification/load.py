"""The load check: transformers builds the model and finds exactly the tensors that it expects."""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from streamconv.planning.plan import Plan
from streamconv.verification.empty_weights import empty_weights
from streamconv.verification.machine import refuse_machine_failure
from streamconv.verification.result import Check

PROVES = "transformers loads every tensor; none is missing, unexpected or of the wrong shape"
# Lists in transformers' loading report that must be empty. Some versions have no "error_msgs".
PROBLEM_LISTS = ("missing_keys", "unexpected_keys", "error_msgs")


def check_load(folder: Path, plan: Plan) -> tuple[Check, Any]:
    """Load ``folder`` as its user will, and return the model too, or None if it does not load.

    transformers only logs tensors that are missing or unexpected; here they fail the check.
    """
    try:
        model, info = _load_model(folder, plan)
    except Exception as error:  # anything else that transformers raises is the result of the check
        refuse_machine_failure(error)
        return Check("load", False, PROVES, (f"{type(error).__name__}: {error}",)), None
    problems = [f"{kind}: {name}" for kind in PROBLEM_LISTS for name in sorted(map(str, info.get(kind, ())))]
    problems += sorted(f"mismatched_keys: {_mismatch(each)}" for each in info["mismatched_keys"])
    return Check("load", not problems, PROVES, tuple(problems), {"parameters": model.num_parameters()}), model


def _mismatch(entry: str | tuple[str, torch.Size, torch.Size]) -> str:
    """Describe an entry of the loading report: a name in transformers 4, and in 5 with the file's shape and its own."""
    return entry if isinstance(entry, str) else f"{entry[0]} is {list(entry[1])}, not {list(entry[2])}"


def _load_model(folder: Path, plan: Plan) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' loading report.

    The weights stay mapped from the file, so on a CPU they need no memory beyond the page cache. If the folder is for
    another class with the same tensors, such as a backbone of feature maps, the report is that of this class, but the
    model is the plain one, whose layers the original has.
    """
    is_classifier = "Classification" in plan.architecture
    classes: Any = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if is_classifier else transformers.MODEL_MAPPING
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    dtype = config.dtype or torch.float32
    plain: Any = classes[type(config)]
    model, report = load_pretrained(plain, folder, dtype)
    if plan.architecture != plain.__name__ and plan.architecture in plan.family.pipeline_tags:
        report = load_pretrained(getattr(transformers, plan.architecture), folder, dtype)[1]
    model.config.return_dict = True  # a source's config may ask for tuples, whose parts have no names
    return model, report


def default_dtype_of(config: Any) -> torch.dtype:
    """Return the dtype that ``from_pretrained`` gives a model if its user names none."""
    is_file_decisive = int(transformers.__version__.partition(".")[0]) >= 5  # transformers 4 gives float32
    return (config.dtype or torch.float32) if is_file_decisive else torch.float32


def load_pretrained(model_class: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Call ``model_class.from_pretrained``, but without what transformers changes in the whole process meanwhile.

    Returns:
        The model, whose missing weights are not initialized, and transformers' loading report.
    """
    loader = _without_patches(model_class, dtype)
    # A decorator in transformers 4 sets the default dtype at the end to what it was at the start.
    load = inspect.unwrap(loader.from_pretrained.__func__)
    return load(  # type: ignore[no-any-return]
        loader,
        folder,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reports them: the error that it raises otherwise only refers to a log
        dtype=dtype,
        **({"attn_implementation": "sdpa"} if model_class._supports_sdpa else {}),  # others have no attention
    )


@cache
def _without_patches(model_class: Any, dtype: torch.dtype) -> Any:
    """A subclass of a transformers model, of the same name, that overrides the methods which change the process."""

    def get_init_context(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [empty_weights(dtype)]

    def keep_default_dtype(cls: Any, dtype: torch.dtype) -> None:
        """transformers 4 restores what this returns, unless it is None."""

    @torch.no_grad()
    def initialize_weights(self: Any) -> None:
        """Compute only the buffers that no file holds: missing weights fail the check anyway."""
        for parameter in self.parameters():
            parameter._is_hf_initialized = True
        for module in self.modules():
            if module._non_persistent_buffers_set:
                self._init_weights(module)

    overrides = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "get_init_context": classmethod(get_init_context),
        "_set_default_dtype": classmethod(keep_default_dtype),
        "initialize_weights": initialize_weights,
    }
    return type(model_class.__name__, (model_class,), overrides)
