"""Compares tensors with those that rules expect, by name, shape and dtype. All problems are listed in one error."""

import itertools
from collections.abc import Callable, Mapping, Sequence

from streamconv.display import first_few
from streamconv.errors import MappingError
from streamconv.families.patterns import ExpandedNames, Indexes
from streamconv.families.rules import Shape
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import DTYPES, DtypeCode

_UNEXPECTED: Shape = (-1,)


def shapes_by_name(shapes: Mapping[str, Shape | None], counts: Indexes) -> ExpandedNames[Shape | None]:
    """Return the shapes of patterns by the names that the patterns expand to."""
    return ExpandedNames({pattern: _constant(shape) for pattern, shape in shapes.items()}, counts)


def _constant(shape: Shape | None) -> Callable[[Indexes], Shape | None]:
    return lambda values: shape


def require_fit(
    tensors: Mapping[str, Expression],
    expected: Mapping[str, Shape | None],
    where: str,
    known_problems: Sequence[str],
    display_names: Mapping[str, str],
    one_dtype: str | None = "a model has one",
    optional: Mapping[str, Shape | None] | None = None,
) -> None:
    """Compare names, shapes and dtypes with the expected ones. A shape of None accepts any.

    ``known_problems`` are listed first. ``display_names`` replace names in the error. ``one_dtype`` is the advice for a
    mixture of dtypes, which None accepts. ``optional`` tensors may be missing, and their dtypes do not matter.

    Raises:
        MappingError: lists every difference.
    """
    optional, missing, unexpected, wrong = optional or {}, len(expected), [], []
    dtypes: dict[DtypeCode, list[str]] = {}
    for name, tensor in tensors.items():
        shape = expected.get(name, _UNEXPECTED)
        if shape is not _UNEXPECTED:
            missing -= 1
            dtypes.setdefault(tensor.info.dtype, []).append(display_names.get(name, name))
        elif (shape := optional.get(name, _UNEXPECTED)) is _UNEXPECTED:
            unexpected.append(name)
            continue
        if shape is not None and tensor.info.shape != shape:
            wrong.append((name, shape))
    wrong_dtypes = _dtype_problems(dtypes, one_dtype)
    problems = itertools.chain(  # formatted lazily: there may be millions, and the error keeps the first of them
        known_problems,
        (
            f"missing: {name}{'' if shape is None else f' {list(shape)}'}"
            for name, shape in expected.items()
            if name not in tensors
        ),
        (f"unexpected: {display_names.get(name, name)} {list(tensors[name].info.shape)}" for name in unexpected),
        (
            f"wrong shape: {display_names.get(name, name)} is {list(tensors[name].info.shape)}, not {list(shape)}"
            for name, shape in wrong
        ),
        wrong_dtypes,
    )
    if count := len(known_problems) + missing + len(unexpected) + len(wrong) + len(wrong_dtypes):
        counted = "1 problem" if count == 1 else f"{count:,} problems"
        raise MappingError(f"{where} does not fit ({counted}):", problems, count)


def _dtype_problems(dtypes: Mapping[DtypeCode, Sequence[str]], one_dtype: str | None) -> list[str]:
    """List dtypes that no model has, and a mixture of dtypes. ``dtypes`` maps each to the names of its tensors."""
    known = [code for code, dtype in DTYPES.items() if dtype.is_weight]
    problems = [
        f"wrong dtype: {first_few(names, 1)} in {dtype}; only {', '.join(known)} are converted"
        for dtype, names in dtypes.items()
        if dtype not in known
    ]
    weights = sorted((len(names), dtype) for dtype, names in dtypes.items() if dtype in known)
    if len(weights) > 1 and one_dtype is not None:
        held = " and ".join(f"{dtype} ({first_few(dtypes[dtype], 1)})" for _, dtype in reversed(weights))
        problems.append(f"mixed dtypes: {held}; {one_dtype}")
    return problems
