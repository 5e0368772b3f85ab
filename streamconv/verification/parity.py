"""The parity check: the original model with the original file, and transformers with the output, on the same input.

Both run layer by layer, and each layer's output is compared as soon as both have it, so memory holds one
layer of each model and two outputs. On a CPU at the native size, the two agree bit for bit in most cases.
transformers splits some layers that are one matrix product in the original, and a CPU may round the parts
differently than the whole. Then float32 differs in the last bits, and both models run again in float64:
its rounding errors are far smaller than the effect of any wrong weight, so the two can be told apart.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from streamconv.errors import UsageError
from streamconv.planning.plan import Plan
from streamconv.progress import Progress
from streamconv.verification.offload import OffloadedModel, allows_tf32, exact_layers
from streamconv.verification.originals import OriginalArchitecture
from streamconv.verification.result import Check

PROVES = "the original model and transformers compute the same outputs from the same image, in every layer"
GPU_TOLERANCE = 1e-3  # as in the original conversion script
# Relative to a layer output's largest value. Rounding causes 1e-15; the last bit of one float32 weight, 1e-12.
FLOAT64_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Pair:
    """The two models to compare; ``architecture`` is the original's, and ``dimensions`` are both models'."""

    original: OffloadedModel
    converted: OffloadedModel
    architecture: OriginalArchitecture
    dimensions: Any
    device: torch.device
    progress: Progress

    @property
    def prefix_tokens(self) -> Mapping[str, int]:
        return self.architecture.prefix_tokens(self.dimensions)

    @property
    def config(self) -> Any:
        return self.converted.model.config


class Comparison:
    """Compares the states (layer outputs) of the original model with those of the converted model, one by one.

    ``differences`` has the largest absolute difference of each state, in the order of computation, and
    ``magnitudes`` the original's largest finite value. ``kept`` has both models' "patches" and "logits".
    """

    def __init__(self, original: Iterator[tuple[str, Tensor]]):
        self._original = original
        self._next: tuple[str, Tensor] | None = next(original, None)
        self.differences: dict[str, float] = {}
        self.magnitudes: dict[str, float] = {}
        self.problems: list[str] = []
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
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
            if name in ("patches", "logits"):
                self.kept[name] = (other, state)
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

    ``comparison`` is in float32. ``judged`` decides: it is the same one, or one in float64.
    ``as_published`` is a comparison with the original's own interpolation, if that differs from transformers'.
    """

    problems: tuple[str, ...]
    numbers: Mapping[str, Any]
    note: str
    comparison: Comparison
    judged: Comparison
    as_published: Comparison | None = None


def check_parity(pair: Pair, plan: Plan, image: Image.Image) -> tuple[Check, Comparison | None]:
    """Run both models on ``image`` at the native size and compare every state."""
    size = plan.config["image_size"]
    proves = f"{PROVES}, at {size}x{size}" + (" (TF32 off)" if pair.device.type == "cuda" else "")
    try:
        verdict = compare(pair, native_pixels(image, plan), "comparing the outputs of both models")
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory(pair.device, error) from error
    except Exception as error:  # torch or transformers rejects the output or the source
        return Check("parity", False, proves, (f"{type(error).__name__}: {error}",)), None
    numbers, start = {"size": size, **verdict.numbers}, verdict.judged.not_finite_from
    not_checked = f"values that are not finite, in {start} and later, were not compared" if start is not None else ""
    check = Check("parity", not verdict.problems, proves + verdict.note, verdict.problems, numbers, not_checked)
    return check, verdict.comparison


def out_of_memory(device: torch.device, error: BaseException) -> UsageError:
    """The error to raise instead of a failed check, because lack of memory says nothing about the output."""
    elsewhere = " Use --device cpu, or free the GPU's memory." if device.type == "cuda" else ""
    return UsageError(f"{device} has too little memory to run the models: {error}.{elsewhere}")


def native_pixels(image: Image.Image, plan: Plan) -> Tensor:
    """Preprocess to (1, 3, S, S), with the model's native size S, at which positions need no interpolation."""
    size, pixel_steps = plan.config["image_size"], plan.pixel_steps
    steps = [
        transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        *([transforms.Normalize(pixel_steps.mean, pixel_steps.std)] if pixel_steps else []),
    ]
    return transforms.Compose(steps)(image).unsqueeze(0)  # type: ignore[no-any-return]


def compare(pair: Pair, pixels: Tensor, what: str, is_native: bool = True) -> Verdict:
    """Run both models on ``pixels``, (1, C, H, W), and compare every state within the device's rounding errors.

    If the pixels do not have the native size, the original interpolates positions as transformers does. If
    its own way is different, it also runs that way; the result is reported, but does not decide.
    """
    is_different = not is_native and pair.architecture.interpolates_differently(pair.dimensions)
    kinds = [True, False] if is_different else [True]
    # TF32 has 10 bits of mantissa: its rounding would hide the differences to be found. It has no float64.
    dtype = torch.float64 if allows_tf32(pair.device) else torch.float32
    found, *published = _run(pair, pixels, dtype, kinds, what)
    tolerance = GPU_TOLERANCE if pair.device.type == "cuda" else 0.0
    judged, note = found, ""
    numbers: dict[str, Any] = {}
    largest = max(found.relative().values(), default=math.inf)
    if pair.device.type == "cpu" and not found.problems and 0 < largest <= GPU_TOLERANCE:
        numbers["float32"] = {"largest": largest, "differences": found.relative()}
        note = f"; in float64, because they differ by {largest:.2g} in float32"
        judged, tolerance = _run(pair, pixels, torch.float64, kinds[:1], what)[0], FLOAT64_TOLERANCE
    if judged.not_finite_from is not None:
        note += f"; from {judged.not_finite_from} on, values that are not finite prove nothing"
    differences = judged.relative()
    failed = [name for name, d in differences.items() if not d <= tolerance]
    problems = list(found.problems)
    if failed:
        size = f"{differences[failed[0]]:.3g} (absolute: {judged.differences[failed[0]]:.3g})"
        rest = f"; {len(failed) - 1} of the {len(differences) - 1} other layer outputs differ too" if failed[1:] else ""
        problems.append(f"the first difference is in {failed[0]}: {size}{rest}")
    numbers |= {
        "tolerance": tolerance, "largest": max(differences.values(), default=math.inf), "differences": differences,
        "absolute": judged.differences, "first": failed[0] if failed else None,
    }  # fmt: skip
    return Verdict(tuple(problems), numbers, note, found, judged, *published)


@torch.no_grad()
def _run(pair: Pair, pixels: Tensor, dtype: torch.dtype, as_transformers: list[bool], what: str) -> list[Comparison]:
    """Run the converted model once, and the original once per way to interpolate, all of them layer by layer."""
    pair.original.compute_in(dtype)
    pair.converted.compute_in(dtype)
    pixels = pixels.to(pair.device, dtype)
    comparisons = [Comparison(pair.architecture.states(pair.original.model, pixels, kind)) for kind in as_transformers]
    total = pair.config.num_hidden_layers + len(pair.prefix_tokens) + 2  # embeddings, patches
    steps = 0

    def compare_state(name: str, state: Tensor) -> None:
        nonlocal steps
        for comparison in comparisons:
            # Between any two layers: each call may cancel the verification, and a layer can take a second.
            pair.progress(what, min(steps, total), total, "steps")
            comparison.compare(name, state)
        steps += 1
        pair.progress(what, min(steps, total), total, "steps")

    with exact_layers(), _state_hooks(pair.converted.model, pair.prefix_tokens, compare_state):
        outputs = pair.converted.model(pixels)
        if "logits" in outputs:
            compare_state("logits", outputs.logits)
        for comparison in comparisons:
            comparison.finish()
    return comparisons


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
