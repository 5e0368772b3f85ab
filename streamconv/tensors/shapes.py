"""The arithmetic of shapes and strides: what torch.Tensor.view does, without tensors."""

import math
from collections.abc import Iterator

Shape = tuple[int, ...]

MAX_PARTS = 65_536  # of one tensor: as many as a checkpoint may have tensors


class TooManyPartsError(ValueError):
    """A view would consist of too many parts. The message names its dtype, shape and number of parts."""


def view_strides(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """Return the strides of the same elements in the shape ``new``, without a 0; None if no strides express it.

    >>> view_strides((2, 3, 4), (12, 4, 1), (6, 4))
    (4, 1)
    >>> view_strides((2, 3), (1, 2), (6,)) is None
    True
    """
    # Sizes and strides of neighbouring dimensions, which are merged if their strides allow it.
    runs: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = runs[-1][0] * size, stride
        else:
            runs.append((size, stride))
    result = [0] * len(new)
    for dim in reversed(range(len(new))):
        if new[dim] == 1:
            continue
        size, stride = runs[-1]
        if size % new[dim]:
            return None
        result[dim] = stride
        runs[-1] = size // new[dim], stride * new[dim]
        if runs[-1][0] == 1:
            runs.pop()
    return tuple(result)


def groups(old: Shape, new: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Divide two shapes of equally many elements, not 0, into the shortest groups of equally many elements.

    >>> [*groups((2, 3, 4), (6, 2, 2))]
    [((2, 3), (6,)), ((4,), (2, 2))]
    """
    i = j = 0
    while i < len(old) or j < len(new):
        first, new_first = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (have := math.prod(old[first:i])) != (want := math.prod(new[new_first:j])):
            i, j = (i + 1, j) if have < want else (i, j + 1)
        if j == len(new):  # then only ones are left
            i = len(old)
        elif i == len(old):
            j = len(new)
        yield old[first:i], new[new_first:j]
