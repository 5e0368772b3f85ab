"""Compares two models' outputs, layer by layer, as the models compute them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor


class Comparison:
    """Compares the states (layer outputs) of the original model with those of the converted model, one by one.

    ``differences`` has the largest absolute difference of each state, in the order of computation, and
    ``magnitudes`` the original's largest finite value. ``outputs`` has both models' states after the last layer.
    """

    def __init__(self, original: Iterator[tuple[str, Tensor]]):
        self._original = original
        self._next: tuple[str, Tensor] | None = next(original, None)
        self.differences: dict[str, float] = {}
        self.magnitudes: dict[str, float] = {}
        self.problems: list[str] = []
        self.outputs: dict[str, tuple[Tensor, Tensor]] = {}
        self.not_finite_from: str | None = None

    def compare(self, name: str, state: Tensor) -> None:
        """Compare the converted model's next state with the original's of the same name."""
        while self._next is not None and _order(self._next[0]) < _order(name):
            self.problems.append(f"{self._next[0]} is missing")
            self._next = next(self._original, None)
        if self._next is None or self._next[0] != name:
            self.problems.append(f"{name} is not in the original")
            return
        other = self._next[1]
        if state.shape != other.shape:
            shapes = f"{list(state.shape)}, but {list(other.shape)} in the original"
            self.problems.append(f"{name} has the shape {shapes}")
        else:
            if self.not_finite_from is None and not other.isfinite().all():
                self.not_finite_from = name
            self.differences[name] = largest_difference(state, other)
            self.magnitudes[name] = float(other.nan_to_num(0.0, 0.0, 0.0).abs().max())
            if name != "embeddings" and not name.startswith("layer "):
                self.outputs[name] = (other, state)
        self._next = next(self._original, None)

    def finish(self) -> None:
        """Report the original's remaining states as missing."""
        while self._next is not None:
            self.problems.append(f"{self._next[0]} is missing")
            self._next = next(self._original, None)

    def relative(self) -> dict[str, float]:
        """The differences that the tolerance applies to: divided by the state's largest value if that is above 1."""
        return {name: d / max(1.0, self.magnitudes[name]) for name, d in self.differences.items()}


def _order(name: str) -> float:
    """A sort key: layers by number, everything after them last. Embeddings come first and are never missing."""
    return int(name.removeprefix("layer ")) if name.startswith("layer ") else math.inf


def largest_difference(state: Tensor, other: Tensor) -> float:
    """The largest absolute difference. Equal infinities and two NaNs do not differ; a single NaN differs infinitely."""
    if torch.equal(state, other):  # the usual case, in a single pass
        return 0.0
    same = (state == other) | (state.isnan() & other.isnan())
    return float((state - other).abs().masked_fill(same, 0.0).nan_to_num(math.inf, math.inf).max())
