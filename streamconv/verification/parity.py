"""The parity rung: the original graph on the original file, transformers on the output, same input.

The two run side by side, layer by layer, and each state is compared when both have it: no more than
one layer of either and two states are in memory. At the native size the two agree bit for bit on a
CPU. Where a CPU's matrix product rounds a layer that transformers splits otherwise than the whole
one, the last bit of float32 differs; then both are run again in float64, where rounding is far
below what any wrong weight makes, so that the two are told apart.
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
from streamconv.verification.offload import OffloadedModel, fast_linear_layers
from streamconv.verification.result import Check

PROVES = "the original graph and transformers compute the same from the same picture, in every layer"
GPU_TOLERANCE = 1e-3  # the original script's
FLOAT64_TOLERANCE = 1e-13  # of a state's largest value: rounding makes 1e-15, one float32 weight's last bit 1e-12

States = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Pair:
    """The original, what drives it (a family's `states`), and what transformers made of the output."""

    original: OffloadedModel
    states: Callable[..., States]
    converted: OffloadedModel
    device: torch.device
    progress: Progress

    @property
    def config(self) -> Any:
        return self.converted.model.config


class Comparison:
    """The states of one original against the converted model's, which are taken in as they come.

    ``differences`` are the largest absolute ones by state, in the order of computation, and
    ``magnitudes`` the original's largest finite values; ``patches`` and ``logits`` keep both models' own.
    """

    def __init__(self, original: States):
        self._original = original
        self._next: tuple[str, Tensor] | None = next(original, None)
        self.differences: dict[str, float] = {}
        self.magnitudes: dict[str, float] = {}
        self.problems: list[str] = []
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.not_finite_from: str | None = None

    def take(self, name: str, state: Tensor) -> None:
        while self._next is not None and _place(self._next[0]) < _place(name):
            self.problems.append(f"{self._next[0]} is missing")
            self._next = next(self._original, None)
        if self._next is None or self._next[0] != name:
            self.problems.append(f"{name} is not in the original")
            return
        other = self._next[1]
        if state.shape != other.shape:
            shapes = f"{list(state.shape)}, and in the original {list(other.shape)}"
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
        """Note what the original has yet to come."""
        while self._next is not None:
            self.problems.append(f"{self._next[0]} is missing")
            self._next = next(self._original, None)

    def relative(self) -> dict[str, float]:
        """The differences as shares of their state's largest value where that is above 1: what is judged."""
        return {name: d / max(1.0, self.magnitudes[name]) for name, d in self.differences.items()}


@dataclass(frozen=True)
class Verdict:
    """``numbers`` are for the rung's.

    ``comparison`` is in float32, ``judged`` the same or in float64; ``as_published`` compares an
    original that interpolates in its own way.
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
        verdict = compare(pair, native_pixels(image, plan), "comparing what both models compute")
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory(pair.device, error) from error
    except Exception as error:  # torch or transformers refuse what was written, or what it was made from
        return Check("parity", False, proves, (f"{type(error).__name__}: {error}",)), None
    numbers, start = {"size": size, **verdict.numbers}, verdict.judged.not_finite_from
    not_checked = f"nothing is proved of {start} and what follows it" if start is not None else ""
    check = Check("parity", not verdict.problems, proves + verdict.note, verdict.problems, numbers, not_checked)
    return check, verdict.comparison


def out_of_memory(device: torch.device, error: BaseException) -> UsageError:
    """That says nothing about the output."""
    elsewhere = " Use --device cpu, or free the GPU's memory." if device.type == "cuda" else ""
    return UsageError(f"The memory of {device} is not enough to run the models: {error}.{elsewhere}")


def native_pixels(image: Image.Image, plan: Plan) -> Tensor:
    """(1, 3, S, S) at the model's own size S, where positions need no interpolation; normalised as published."""
    size, processor = plan.config["image_size"], plan.image_processor
    steps = [
        transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(processor["image_mean"], processor["image_std"]),
    ]
    return transforms.Compose(steps)(image).unsqueeze(0)  # type: ignore[no-any-return]


def compare(pair: Pair, pixels: Tensor, what: str, is_native: bool = True) -> Verdict:
    """Both models on ``pixels``, (1, C, H, W), every state within what the device's rounding makes.

    Where the pixels are not of the native size, the original interpolates positions as
    transformers does, and, where its own way is another, runs once more in that, unjudged.
    """
    registers = getattr(pair.config, "num_register_tokens", 0)  # with them, both interpolate to the size
    is_same_way = is_native or registers > 0
    kinds = [True] if is_same_way else [True, False]
    found, *published = _run(pair, pixels, torch.float32, kinds, what)
    tolerance = GPU_TOLERANCE if pair.device.type == "cuda" else 0.0
    judged, note = found, ""
    numbers: dict[str, Any] = {}
    largest = max(found.relative().values(), default=math.inf)
    if pair.device.type == "cpu" and not found.problems and 0 < largest <= GPU_TOLERANCE:
        numbers["float32"] = {"largest": largest, "differences": found.relative()}
        note = f"; in float64, since float32 rounds otherwise here, by {largest:.2g}"
        judged, tolerance = _run(pair, pixels, torch.float64, kinds[:1], what)[0], FLOAT64_TOLERANCE
    if judged.not_finite_from is not None:
        note += f"; from {judged.not_finite_from} on there are values that are not finite, of which this proves nothing"
    differences = judged.relative()
    beyond = [name for name, d in differences.items() if not d <= tolerance]
    problems = list(found.problems)
    if beyond:
        by = f"{differences[beyond[0]]:.3g} (absolute: {judged.differences[beyond[0]]:.3g})"
        rest = f"; {len(beyond) - 1} of the {len(differences) - 1} other states differ too" if beyond[1:] else ""
        problems.append(f"the first difference is in {beyond[0]}, by {by}{rest}")
    numbers |= {
        "tolerance": tolerance, "largest": max(differences.values(), default=math.inf), "differences": differences,
        "absolute": judged.differences, "first": beyond[0] if beyond else None,
    }  # fmt: skip
    return Verdict(tuple(problems), numbers, note, found, judged, *published)


@torch.no_grad()
def _run(pair: Pair, pixels: Tensor, dtype: torch.dtype, as_transformers: list[bool], what: str) -> list[Comparison]:
    """The converted model once, the original once for each way to interpolate, all layer by layer."""
    pair.original.compute_in(dtype)
    pair.converted.compute_in(dtype)
    pixels = pixels.to(pair.device, dtype)
    found = [Comparison(pair.states(pair.original.model, pixels, kind)) for kind in as_transformers]
    total = pair.config.num_hidden_layers + 3  # the embeddings, the class token and the patches
    steps = 0

    def take(name: str, state: Tensor) -> None:
        nonlocal steps
        for comparison in found:
            comparison.take(name, state)
        steps += 1
        pair.progress(what, min(steps, total), total, "steps")

    with fast_linear_layers(), _states_taken(pair.converted.model, take):
        outputs = pair.converted.model(pixels)
        if "logits" in outputs:
            take("logits", outputs.logits)
        for comparison in found:
            comparison.finish()
    return found


@contextmanager
def _states_taken(model: Any, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``take`` with every state of a transformers model in a forward pass, named as the originals' are."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))

    def first(module: nn.Module, args: Any, kwargs: Any) -> None:
        take("embeddings", args[0] if args else kwargs["hidden_states"])

    def layer(i: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: take(f"layer {i}", output[0] if isinstance(output, tuple) else output)

    def last(module: nn.Module, args: Any, output: Any) -> None:
        registers = getattr(model.config, "num_register_tokens", 0)
        take("cls", output.last_hidden_state[:, 0])
        if registers:
            take("registers", output.last_hidden_state[:, 1 : 1 + registers])
        take("patches", output.last_hidden_state[:, 1 + registers :])

    with ExitStack() as stack:
        stack.callback(layers[0].register_forward_pre_hook(first, with_kwargs=True).remove)
        for i, module in enumerate(layers):
            stack.callback(module.register_forward_hook(layer(i)).remove)
        stack.callback(model.base_model.register_forward_hook(last).remove)
        yield


def _place(name: str) -> float:
    """Where a state stands among the layers; the embeddings, which are always there, need no place."""
    return int(name.removeprefix("layer ")) if name.startswith("layer ") else math.inf


def _largest_difference(state: Tensor, other: Tensor) -> float:
    """Equal infinities and two NaNs are no difference; one NaN is an infinite one."""
    if torch.equal(state, other):  # one pass over both, and mostly all that is needed
        return 0.0
    same = (state == other) | (state.isnan() & other.isnan())
    return float((state - other).abs().masked_fill(same, 0.0).nan_to_num(math.inf, math.inf).max())
