"""Runs the original and the converted model in lockstep: each layer of one, then the same layer of the other.

So memory holds one layer of each model and two outputs, however many layers there are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING

from streamconv.progress import Progress
from streamconv.verification.comparison import Comparison
from streamconv.verification.offload import OffloadedModel
from streamconv.verification.originals import OriginalArchitecture


@dataclass(frozen=True)
class Pair:
    """The two models to compare; ``architecture`` is the original's, and ``dimensions`` are both models'.

    ``native_size`` is the height and width of images whose positions need no interpolation. ``cast_to`` is the dtype
    that the conversion cast the weights to, if it did. ``is_read_once``: only what decides is computed, for instance
    because weights arrive over a network.
    """

    original: OffloadedModel
    converted: OffloadedModel
    architecture: OriginalArchitecture
    dimensions: Any
    native_size: int
    device: torch.device
    progress: Progress
    cast_to: torch.dtype | None = None
    is_read_once: bool = False

    @property
    def prefix_tokens(self) -> Mapping[str, int]:
        return self.architecture.prefix_tokens(self.dimensions)

    @property
    def layers(self) -> Sequence[Any]:
        """The layers of the converted model."""
        return self.architecture.layers(self.converted.model)

    @property
    def state_count(self) -> int:
        """The number of states of a model without a classifier: its layers', embeddings, prefix tokens and patches."""
        return len(self.layers) + len(self.prefix_tokens) + 2

    @property
    def config(self) -> Any:
        return self.converted.model.config


@dataclass(frozen=True)
class Variant:
    """A way to run the original model: with transformers' interpolation of positions or its own, cast or uncast."""

    as_transformers: bool = True
    is_cast: bool = True


@torch.no_grad()
def run_pair(
    pair: Pair, pixels: Tensor, dtype: torch.dtype, variants: list[Variant], what: str
) -> dict[Variant, Comparison]:
    """Run the converted model once and, together with it layer by layer, every variant of the original."""
    total = pair.state_count
    steps = 0

    def compare_state(name: str, state: Tensor) -> None:
        nonlocal steps
        for comparison in comparisons.values():
            # Between any two layers: each call may cancel the verification, and a layer can take a second.
            pair.progress(what, min(steps, total), total, "steps")
            comparison.compare(name, state)
        steps += 1
        pair.progress(what, min(steps, total), total, "steps")

    pair.original.compute_in(dtype)
    pixels = pixels.to(pair.device, dtype)
    comparisons = {variant: Comparison(_original_states(pair, variant, pixels)) for variant in variants}
    run_converted(pair, pixels, dtype, compare_state)
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
def run_converted(pair: Pair, pixels: Tensor, dtype: torch.dtype, receive: Callable[[str, Tensor], None]) -> None:
    """Run the converted model, and call ``receive`` with each of its states."""
    pair.converted.compute_in(dtype)
    with _state_hooks(pair, receive):
        outputs = pair.converted.model(pixels.to(pair.device, dtype))
        if "logits" in outputs:
            receive("logits", outputs.logits)


@contextmanager
def _state_hooks(pair: Pair, receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``receive`` with every state of the converted model's forward pass, named as in `originals`."""
    layers, classes = pair.layers, cast(Any, MODEL_MAPPING)
    # Not `base_model`, which is only a part of the plain model in some classes.
    plain = next(each for each in pair.converted.model.modules() if isinstance(each, classes[type(pair.config)]))

    def first(module: nn.Module, args: Any, kwargs: Any) -> None:
        receive("embeddings", args[0] if args else kwargs["hidden_states"])

    def layer(i: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: receive(f"layer {i}", output[0] if isinstance(output, tuple) else output)

    def last(module: nn.Module, args: Any, output: Any) -> None:
        tokens = output.last_hidden_state
        for name, count in pair.prefix_tokens.items():
            receive(name, tokens[:, :count])
            tokens = tokens[:, count:]
        receive("patches", tokens)

    with ExitStack() as stack:
        stack.callback(layers[0].register_forward_pre_hook(first, with_kwargs=True).remove)
        for i, module in enumerate(layers):
            stack.callback(module.register_forward_hook(layer(i)).remove)
        stack.callback(plain.register_forward_hook(last).remove)
        yield
