"""The parity rung: the original graph on the original file, transformers on the output, same input.

At the native grid the two agree bit for bit on a CPU, in every layer; whatever differs is an error
of the conversion. The models take turns, so that a device holds one at a time.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor
from torchvision import transforms

from streamconv.families import HEAD_PREFIX
from streamconv.plan import Plan
from streamconv.progress import Progress
from streamconv.sources import Source
from streamconv.verify import GPU_TOLERANCE, Rung
from streamconv.verify.load import load_model

PROVES = "the original graph and transformers compute the same from the same picture, in every layer"
TOP = 5


@torch.inference_mode()
def check_parity(
    folder: Path,
    plan: Plan,
    source: Source,
    image: Image.Image,
    device: torch.device,
    report: Progress,
) -> tuple[Rung, tuple[tuple[str, float], ...]]:
    """Run both models on ``image`` and compare every state; a classifier's best labels come beside."""
    tolerance = 0.0 if device.type == "cpu" else GPU_TOLERANCE
    pixels = _pixels(image, plan).to(device)
    steps, total = 0, 2 * (plan.config["num_hidden_layers"] + 2)

    def counted(states: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal steps
        for name, state in states:
            steps += name.startswith(("embeddings", "layer", "cls"))
            report("comparing what both models compute", steps, total, "steps")
            yield name, state

    originals = {name: state.cpu() for name, state in counted(_original_states(plan, source, pixels))}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model, _ = load_model(folder, plan)
    differences: dict[str, float] = {}
    problems = []
    predictions: tuple[tuple[str, float], ...] = ()
    for name, state in counted(_converted_states(model.to(device), pixels)):
        other, state = originals.pop(name), state.cpu()
        if state.shape != other.shape:
            problems.append(f"{name} has the shape {list(state.shape)}, not {list(other.shape)}")
            continue
        difference = differences[name] = float((state - other).abs().max())
        if not difference <= tolerance:  # NaN does not pass either
            problems.append(f"{name} differs by {difference:.3g}")
        if name == "logits":
            predictions = _best(state, model.config.id2label)
    problems += [f"{name} is missing" for name in originals]
    if not differences:
        problems.append("nothing was compared")
    numbers = {"tolerance": tolerance, "largest": max(differences.values(), default=None), "differences": differences}
    size = plan.config["image_size"]
    proves = f"{PROVES}, at {size}x{size}" + (" (TF32 off)" if device.type == "cuda" else "")
    return Rung("parity", not problems, proves, tuple(problems), numbers), predictions


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
        model = module.build(plan.geometry)
    state = torch.load(source.backbone, map_location="cpu", mmap=True, weights_only=True)
    if source.head is not None:
        head = torch.load(source.head, map_location="cpu", mmap=True, weights_only=True)
        state = {**state, **{HEAD_PREFIX + name: value for name, value in head.items()}}
    model.load_state_dict(state, strict=True, assign=True)
    yield from model.eval().to(pixels.device).states(pixels)


def _converted_states(model: Any, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    outputs = model(pixels, output_hidden_states=True)
    for i, state in enumerate(outputs.hidden_states):
        yield ("embeddings" if i == 0 else f"layer {i - 1}"), state
    last = outputs.last_hidden_state if "last_hidden_state" in outputs else _norm_of(model)(outputs.hidden_states[-1])
    yield "cls", last[:, 0]
    yield "patches", last[:, 1:]
    if "logits" in outputs:
        yield "logits", outputs.logits


def _norm_of(model: Any) -> Any:
    """A classifier does not give its normalised states: its backbone's last norm makes them again."""
    return getattr(model, model.base_model_prefix).layernorm


def _best(logits: Tensor, labels: dict[int, str]) -> tuple[tuple[str, float], ...]:
    shares, ids = logits[0].softmax(-1).topk(min(TOP, logits.shape[-1]))
    return tuple((labels[int(i)], float(share)) for i, share in zip(ids, shares, strict=True))
