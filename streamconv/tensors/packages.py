"""Checks that the packages for evaluating tensors are installed. Copies and constants need none."""

from collections.abc import Mapping
from importlib.util import find_spec

from streamconv.errors import UsageError
from streamconv.tensors.computed import Cast
from streamconv.tensors.expressions import Expression
from streamconv.tensors.tiles import is_gathered


def check_packages(tensors: Mapping[str, Expression]) -> None:
    """Check that the packages for evaluating these tensors are installed, without importing them.

    Raises:
        UsageError: some are missing.
    """
    for name, tensor in tensors.items():
        if tensor.is_copied and not is_gathered(tensor):
            continue
        wanted = ("numpy",) if tensor.is_copied else ("numpy", "ml_dtypes")
        missing = [package for package in wanted if find_spec(package) is None]
        if missing:
            verb = "Putting the values of {} in order" if tensor.is_copied else "Computing the values of {}"
            what = "Casting" if isinstance(tensor, Cast) else verb.format(name)
            raise UsageError(
                f"{what} needs {' and '.join(missing)}, which this Python does not have. "
                f"Run `pip install {' '.join(missing)}`."
            )
