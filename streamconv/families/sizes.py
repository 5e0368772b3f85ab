"""Reads sizes from the shapes of a checkpoint's tensors, some of which may be missing or have the wrong shape."""

from collections.abc import Iterable, Mapping
from typing import Any

from streamconv.tensors.info import TensorInfo


def size_of(infos: Mapping[str, TensorInfo], key: str, axis: int, ndim: int, default: int = 0) -> int:
    """Return the size of one axis; ``default`` if the tensor is missing or does not have ``ndim`` dimensions."""
    shape = infos[key].shape if key in infos else ()
    return shape[axis] if len(shape) == ndim else default


def most_common_size(infos: Mapping[str, TensorInfo], places: Iterable[tuple[str, int, int]]) -> int:
    """Return the size that most of the ``places`` have, each a key, an axis and a number of dimensions; 0 if none has.

    So one tensor of another size is reported as wrong, and not all others.
    """
    sizes = [size for size in (size_of(infos, *place) for place in places) if size]
    return max(sizes, key=sizes.count, default=0)


def epsilon_in(config: Mapping[str, Any]) -> float | None:
    """Return the layer norms' epsilon in a config.json; None if it has none between 0 and 1."""
    epsilon: Any = config.get("layer_norm_eps")
    return float(epsilon) if type(epsilon) in (int, float) and 0 < epsilon < 1 else None
