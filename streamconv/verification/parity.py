"""The parity check: the original model with the original file, and transformers with the output, on the same input.

Both run layer by layer, and each layer's output is compared as soon as both have it, so memory holds one
layer of each model and two outputs. On a CPU, the two agree bit for bit in most cases.
transformers splits some layers that are one matrix product in the original, and a processor may round the parts
differently from the whole. Then the last bits differ in float32, and both models run again in float64, where rounding
errors are far smaller than the effect of any wrong weight.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamconv.errors import StreamconvError, UsageError
from streamconv.progress import Progress
from streamconv.verification.offload import OffloadedModel
from streamconv.verification.originals import OriginalArchitecture
from streamconv.verification.precision import exact_float32
from streamconv.verification.result import CastCost, Check

PROVES = "the original model and transformers compute the same output in every layer, from one image"
FLOAT32_TOLERANCE = 1e-3  # as in the original conversion script
# Relative to a layer output's largest value. Rounding causes 1e-15; the last bit of one float32 weight, 1e-12.
FLOAT64_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Pair:
    """The two models to compare; ``architecture`` is the original's, and ``dimensions`` are both models'.

    ``cast_to`` is the dtype that the conversion cast the weights to, if it did. ``is_read_once``: only what decides is
    computed, for instance because weights arrive over a network.
    """

    original: OffloadedModel
    converted: OffloadedModel
    architecture: OriginalArchitecture
    dimensions: Any
    device: torch.device
    progress: Progress
    cast_to: torch.dtype | None = None
    is_read_once: bool = False

    @property
    def prefix_tokens(self) -> Mapping[str, int]:
        return self.architecture.prefix_tokens(self.dimensions)

    @property
    def config(self) -> Any:
        return self.converted.model.config


@dataclass(frozen=True)
class Variant:
    """A way to run the original model: with transformers' interpolation of positions or its own, cast or uncast."""

    as_transformers: bool = True
    is_cast: bool = True


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
            self.differences[name] = _largest_difference(state, other)
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


@dataclass(frozen=True)
class Verdict:
    """The result of `compare`. ``problems`` and ``numbers`` are those of the check.

    ``outputs`` are both models' last states in float32, the original's first.
    """

    problems: tuple[str, ...]
    numbers: Mapping[str, Any]
    note: str
    not_checked: str
    outputs: Mapping[str, tuple[Tensor, Tensor]]
    cast_cost: CastCost | None


def check_parity(pair: Pair, name: str, pixels: Tensor, default_dtype: torch.dtype) -> tuple[Check, Verdict | None]:
    """Run both models on ``pixels``, (1, C, S, S), and compare every state.

    Args:
        default_dtype: The dtype that ``from_pretrained`` gives the output by default.
    """
    size = pixels.shape[-1]
    proves = f"{PROVES} at {size}x{size}"
    try:
        with exact_float32(pair.device):
            verdict = compare(pair, pixels, f"comparing both models at {size}x{size}", default_dtype)
    except StreamconvError:  # a source that is read while the model runs
        raise
    except Exception as error:  # torch or transformers rejects the output or the source, or a GPU fails
        if pair.device.type != "cpu":
            raise  # the caller finds out which
        if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):  # which says nothing about the output
            raise UsageError(f"{pair.device} has too little memory to run the models: {error}.") from error
        problem = f"{type(error).__name__}: {error}"
        return Check(name, False, proves, (problem,), {"error": problem}), None
    numbers = {"size": size, "native_size": pair.config.image_size, **verdict.numbers}
    proves += verdict.note
    return Check(name, not verdict.problems, proves, verdict.problems, numbers, verdict.not_checked), verdict


def compare(pair: Pair, pixels: Tensor, what: str, default_dtype: torch.dtype) -> Verdict:
    """Run both models on ``pixels``, (1, C, H, W), and compare every state within the device's rounding errors.

    If the pixels do not have the native size, the original interpolates positions as transformers does. If its own way
    is different, it also runs in that way, which is reported but decides nothing.
    """
    is_native = pixels.shape[-2:] == (pair.config.image_size,) * 2
    published, uncast = Variant(as_transformers=False), Variant(is_cast=False)
    variants = [Variant()]
    if not pair.is_read_once:
        is_different = not is_native and pair.architecture.interpolates_differently(pair.dimensions)
        variants += [published] * is_different + [uncast] * (pair.cast_to is not None)
    found = _run(pair, pixels, torch.float32, variants, what)
    judged, tolerance, note, not_checked = found[variants[0]], 0.0, "", ""
    numbers: dict[str, Any] = {}
    largest = max(judged.relative().values(), default=math.inf)
    if not judged.problems and largest > 0:
        try:
            decisive = _run(pair, pixels, torch.float64, variants[:1], f"{what}, in float64")[variants[0]]
        except (torch.cuda.OutOfMemoryError, MemoryError):
            tolerance = FLOAT32_TOLERANCE
            numbers["float32_only"] = f"{pair.device} has too little memory for float64"
            limit = f"errors below {tolerance:g} of a layer's largest value"
            not_checked = f"{numbers['float32_only']}, so {limit} cannot be excluded"
        else:
            numbers["float32"] = {"largest": largest, "differences": judged.relative()}
            note = " (decided by a second pass in float64)"
            judged, tolerance = decisive, FLOAT64_TOLERANCE
    if judged.not_finite_from is not None:
        values = f"infinite and NaN outputs, from {judged.not_finite_from} on, prove nothing"
        not_checked = "; ".join(filter(None, [not_checked, values]))
    differences = judged.relative()
    failed = [name for name, d in differences.items() if not d <= tolerance]
    problems = list(judged.problems)
    if failed:
        size = f"{differences[failed[0]]:.3g} (absolute: {judged.differences[failed[0]]:.3g})"
        rest = f"; {len(failed) - 1} of the {len(differences) - 1} other layer outputs differ too" if failed[1:] else ""
        problems.append(f"the first difference is in {failed[0]}: {size}{rest}")
    numbers |= {
        "tolerance": tolerance, "largest": max(differences.values(), default=math.inf), "differences": differences,
        "absolute": judged.differences, "first": failed[0] if failed else None,
    }  # fmt: skip
    if published in found:
        as_published = found[published].differences
        numbers["as_published"] = {name: as_published[name] for name in found[published].outputs}
    cast_cost = None
    if uncast in found and not problems:
        cast_cost = _cast_cost(pair, pixels, found[uncast], default_dtype)
    outputs = found[variants[0]].outputs
    return Verdict(tuple(problems), numbers, note, not_checked, outputs, cast_cost)


@torch.no_grad()
def _run(
    pair: Pair, pixels: Tensor, dtype: torch.dtype, variants: list[Variant], what: str
) -> dict[Variant, Comparison]:
    """Run the converted model once and, together with it layer by layer, every variant of the original."""
    total = pair.config.num_hidden_layers + len(pair.prefix_tokens) + 2  # embeddings, patches
    steps = 0

    def compare_state(name: str, state: Tensor) -> None:
        nonlocal steps
        for comparison in comparisons.values():
            # Between any two layers: each call may cancel the verification, and a layer can take a second.
            pair.progress(what, min(steps, total), total, "steps")
            comparison.compare(name, state)
        steps += 1
        pair.progress(what, min(steps, total), total, "steps")

    with exact_float32(pair.device):
        pair.original.compute_in(dtype)
        pixels = pixels.to(pair.device, dtype)
        comparisons = {variant: Comparison(_original_states(pair, variant, pixels)) for variant in variants}
        _run_converted(pair, pixels, dtype, compare_state)
        for comparison in comparisons.values():
            comparison.finish()
    return comparisons


def _original_states(pair: Pair, variant: Variant, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    states = pair.architecture.states(pair.original.model, pixels, variant.as_transformers)
    while True:
        pair.original.cast_to(pair.cast_to if variant.is_cast else None)  # another variant may have run since
        state = next(states, None)
        if state is None:
            return
        yield state


@torch.no_grad()
def _run_converted(pair: Pair, pixels: Tensor, dtype: torch.dtype, receive: Callable[[str, Tensor], None]) -> None:
    """Run the converted model, and call ``receive`` with each of its states."""
    pair.converted.compute_in(dtype)
    with _state_hooks(pair.converted.model, pair.prefix_tokens, receive):
        outputs = pair.converted.model(pixels.to(pair.device, dtype))
        if "logits" in outputs:
            receive("logits", outputs.logits)


def _cast_cost(pair: Pair, pixels: Tensor, uncast: Comparison, default_dtype: torch.dtype) -> CastCost | None:
    """Compare the output, as ``from_pretrained`` loads it by default, with the uncast original."""
    found: dict[str, Tensor] = {}
    total = pair.config.num_hidden_layers + len(pair.prefix_tokens) + 2

    def keep(name: str, state: Tensor) -> None:
        pair.progress("measuring the cost of the cast", min(len(found), total), total, "steps")
        found[name] = state if name in uncast.outputs else state[:0]

    if default_dtype == torch.float32:
        found = {name: converted for name, (_, converted) in uncast.outputs.items()}
    else:
        _run_converted(pair, pixels, default_dtype, keep)
    if not uncast.outputs.keys() <= found.keys():
        return None
    return CastCost(
        dtype=str(default_dtype).removeprefix("torch."),
        largest=max(_largest_difference(found[name].float(), stored) for name, (stored, _) in uncast.outputs.items()),
        largest_in_float32=max(uncast.differences[name] for name in uncast.outputs),
        magnitude=max(uncast.magnitudes[name] for name in uncast.outputs),
    )


@contextmanager
def _state_hooks(
    model: Any, prefix_tokens: Mapping[str, int], receive: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``receive`` with every state of a transformers model's forward pass, named as in `originals`."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))

    def first(module: nn.Module, args: Any, kwargs: Any) -> None:
        receive("embeddings", args[0] if args else kwargs["hidden_states"])

    def layer(i: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: receive(f"layer {i}", output[0] if isinstance(output, tuple) else output)

    def last(module: nn.Module, args: Any, output: Any) -> None:
        tokens = output.last_hidden_state
        for name, count in prefix_tokens.items():
            receive(name, tokens[:, :count])
            tokens = tokens[:, count:]
        receive("patches", tokens)

    with ExitStack() as stack:
        stack.callback(layers[0].register_forward_pre_hook(first, with_kwargs=True).remove)
        for i, module in enumerate(layers):
            stack.callback(module.register_forward_hook(layer(i)).remove)
        stack.callback(model.base_model.register_forward_hook(last).remove)
        yield


def _order(name: str) -> float:
    """A sort key: layers by number, everything after them last. Embeddings come first and are never missing."""
    return int(name.removeprefix("layer ")) if name.startswith("layer ") else math.inf


def _largest_difference(state: Tensor, other: Tensor) -> float:
    """The largest absolute difference. Equal infinities and two NaNs do not differ; a single NaN differs infinitely."""
    if torch.equal(state, other):  # the usual case, in a single pass
        return 0.0
    same = (state == other) | (state.isnan() & other.isnan())
    return float((state - other).abs().masked_fill(same, 0.0).nan_to_num(math.inf, math.inf).max())
