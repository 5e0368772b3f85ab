"""The parity rung: the original graph on the original file, transformers on the output, same input.

At the native grid the two agree bit for bit on a CPU, in every layer. Where a CPU's matrix product
rounds a layer that transformers splits otherwise than the whole one, the last bit of float32
differs; then both are run again in float64, where rounding is far below what any wrong weight
makes, so that the two are told apart. The models take turns: a device holds one at a time.
"""

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from streamconv.families import HEAD_PREFIX
from streamconv.plan import Plan
from streamconv.progress import Progress
from streamconv.sources import Source
from streamconv.verify import Rung
from streamconv.verify.load import load_model

PROVES = "the original graph and transformers compute the same from the same picture, in every layer"
GPU_TOLERANCE = 1e-3  # the original script's
FLOAT64_TOLERANCE = 1e-13  # of a state's largest value: rounding makes 1e-15, one float32 weight's last bit 1e-12
TOP = 5

Predictions = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Comparison:
    """By state: the largest absolute difference, and the largest value to measure it by."""

    differences: dict[str, float]
    magnitudes: dict[str, float]
    problems: tuple[str, ...]
    predictions: Predictions

    @property
    def largest(self) -> float:
        return max(self.differences.values(), default=math.inf)

    def relative(self) -> "Comparison":
        """The differences as shares of their state's largest value."""
        shares = {name: d / max(1.0, self.magnitudes[name]) for name, d in self.differences.items()}
        return replace(self, differences=shares)

    def beyond(self, tolerance: float) -> tuple[str, ...]:
        """What is wrong, in the order in which it was computed: the first state named is where it began."""
        differing = [f"{name} differs by {d:.3g}" for name, d in self.differences.items() if not d <= tolerance]
        return (*self.problems, *differing)


def check_parity(
    folder: Path, plan: Plan, source: Source, image: Image.Image, device: torch.device, progress: Progress
) -> tuple[Rung, Predictions]:
    """Run both models on ``image`` and compare every state; a classifier's best labels come beside."""
    size = plan.config["image_size"]
    proves = f"{PROVES}, at {size}x{size}" + (" (TF32 off)" if device.type == "cuda" else "")
    pixels = _pixels(image, plan).to(device)
    tolerance = GPU_TOLERANCE if device.type == "cuda" else 0.0
    try:
        found = _compare(folder, plan, source, pixels, progress)
    except Exception as error:  # torch or transformers refuse what was written, or what it was made from
        return Rung("parity", False, proves, (f"{type(error).__name__}: {error}",)), ()
    numbers: dict[str, Any] = {"tolerance": tolerance, "largest": found.largest, "differences": found.differences}
    problems = found.beyond(tolerance)
    if problems and not found.problems and found.largest <= GPU_TOLERANCE and device.type == "cpu":
        again = _compare(folder, plan, source, pixels.double(), progress).relative()
        problems = again.beyond(FLOAT64_TOLERANCE)
        numbers |= {
            "tolerance": FLOAT64_TOLERANCE, "largest": again.largest, "differences": again.differences,
            "float32": {"largest": found.largest, "differences": found.differences},
        }  # fmt: skip
        proves += f"; in float64 and relatively, since float32 rounds otherwise here, by {found.largest:.2g}"
    return Rung("parity", not problems, proves, problems, numbers), found.predictions


@torch.no_grad()
def _compare(folder: Path, plan: Plan, source: Source, pixels: Tensor, progress: Progress) -> Comparison:
    """Both models on ``pixels``, (1, C, S, S), in the precision of the pixels."""
    steps, total = 0, 2 * (plan.config["num_hidden_layers"] + 2)

    def counted(states: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal steps
        for name, state in states:
            steps += name.startswith(("embeddings", "layer", "cls"))
            progress("comparing what both models compute", steps, total, "steps")
            yield name, state

    originals = {name: state.cpu() for name, state in counted(_original_states(plan, source, pixels))}
    if pixels.is_cuda:
        torch.cuda.empty_cache()
    model, _ = load_model(folder, plan)
    differences: dict[str, float] = {}
    magnitudes: dict[str, float] = {}
    problems = []
    predictions: Predictions = ()
    for name, state in counted(_converted_states(model.to(pixels.device), pixels)):
        other, state = originals.pop(name, None), state.cpu()
        if other is None or state.shape != other.shape:
            there = "is not there" if other is None else f"has the shape {list(other.shape)}"
            problems.append(f"{name} has the shape {list(state.shape)}, and in the original {there}")
            continue
        differences[name] = _largest_difference(state, other)
        magnitudes[name] = float(other.abs().max())
        if name == "logits":
            predictions = _best(state, model.config.id2label)
    problems += [f"{name} is missing" for name in originals]
    return Comparison(differences, magnitudes, tuple(problems), predictions)


def _largest_difference(state: Tensor, other: Tensor) -> float:
    """Equal infinities and two NaNs are no difference; one NaN is an infinite one."""
    same = (state == other) | (state.isnan() & other.isnan())
    return float((state - other).abs().masked_fill(same, 0.0).nan_to_num(math.inf, math.inf).max())


def _pixels(image: Image.Image, plan: Plan) -> Tensor:
    """(1, 3, S, S) at the model's own size S, where positions need no interpolation; normalised as published."""
    size, processor = plan.config["image_size"], plan.family.image_processor
    steps = [
        transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(processor["image_mean"], processor["image_std"]),
    ]
    return transforms.Compose(steps)(image).unsqueeze(0)  # type: ignore[no-any-return]


def _original_states(plan: Plan, source: Source, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """torch reads the original file itself here: this rung shares nothing with the conversion but the sizes."""
    module = importlib.import_module(f"streamconv.verify.originals.{plan.family.name}")
    with init_empty_weights():
        model: Any = module.build(plan.geometry)
    state = torch.load(source.backbone, map_location="cpu", mmap=True, weights_only=True)
    if source.head is not None:
        head = torch.load(source.head, map_location="cpu", mmap=True, weights_only=True)
        state = {**state, **{HEAD_PREFIX + name: value for name, value in head.items()}}
    model.load_state_dict(state, strict=True, assign=True)
    _compute_in(pixels.dtype, model.eval().to(pixels.device))
    yield from model.states(pixels)


def _converted_states(model: Any, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    _compute_in(pixels.dtype, model)
    outputs = model(pixels, output_hidden_states=True)
    for i, state in enumerate(outputs.hidden_states):
        yield ("embeddings" if i == 0 else f"layer {i - 1}"), state
    if "last_hidden_state" in outputs:
        last = outputs.last_hidden_state
    else:  # a classifier does not give its normalised states: its backbone's last norm makes them again
        last = getattr(model, model.base_model_prefix).layernorm(outputs.hidden_states[-1])
    yield "cls", last[:, 0]
    yield "patches", last[:, 1:]
    if "logits" in outputs:
        yield "logits", outputs.logits


def _compute_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Give each linear layer's weights memory of torch's own, in ``dtype``, while the layer runs.

    On a CPU this holds one layer in memory, and not the model: the weights are mapped from their
    file. They are copied even where they have the dtype: a matrix product may round otherwise at
    another alignment, and a file's alignment is its own.
    """

    def take(layer: nn.Module, inputs: Any) -> None:
        mapped[layer] = [parameter.data for parameter in layer.parameters(recurse=False)]
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype, copy=not parameter.is_cuda)

    def give_back(layer: nn.Module, inputs: Any, output: Any) -> None:
        for parameter, data in zip(layer.parameters(recurse=False), mapped.pop(layer), strict=True):
            parameter.data = data

    mapped: dict[nn.Module, list[Tensor]] = {}
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(take)
            layer.register_forward_hook(give_back)
        else:  # norms, tokens and the patches' convolution: small
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype, copy=True)


def _best(logits: Tensor, labels: dict[int, str]) -> Predictions:
    shares, ids = logits[0].softmax(-1).topk(min(TOP, logits.shape[-1]))
    return tuple((labels[int(i)], float(share)) for i, share in zip(ids, shares, strict=True))
