"""Runs a model whose weights stay in their file: a layer's weights are on the device only while the layer runs.

A hook for accelerate copies them into a buffer on the device, a CPU or a GPU, and the next layer reuses it. So the
device needs memory for one layer, not for the model, and nothing is allocated or freed for each weight. Weights also
have the same alignment wherever they lie in their file; otherwise, a CPU may round differently. accelerate's own hook
for this changes an environment variable, which other threads see, and empties the GPU's cache for every weight.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from streamconv.verification.page_cache import return_freed_buffers
from streamconv.verification.weights import Weights

# Modules up to this size are loaded as a whole. Some of xFormers' modules read their children's weights and never call
# the children; the largest, the feed-forward part of ViT-g, has 75 MB. A GPU has room for a whole layer, 113 MB for
# ViT-g, so that the layer's weights are moved once for all inputs that it runs on.
MODULE_BYTES = {"cpu": 80 << 20, "cuda": 512 << 20}
# Their children may be called one by one, without a call of the container, whose hook then would not run.
CONTAINERS = (nn.ModuleList, nn.Sequential)
# Of weights. The buffers that such a module computes with are worth returning, although that takes time: it is the
# feed-forward part of ViT-g in float64, or that of a larger model.
TRIM_BYTES = 100 << 20
ALIGNMENT = 64  # bytes, as torch aligns what it allocates


@dataclass(frozen=True)
class _Kept:
    """The weights of a module at the start of a buffer, and where they end. ``key`` decides their values."""

    key: object
    weights: list[nn.Parameter]
    end: int


class WeightBuffer:
    """A buffer on a device for the weights of the running modules. It is a stack, because modules are nested.

    The weights at its start are ``kept`` after their module has run, until others are loaded: another input may come.
    """

    def __init__(self, device: torch.device):
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self.used = 0
        self.kept: _Kept | None = None

    def reserve(self, size: int) -> None:
        """Empty the buffer, and make room for ``size`` bytes."""
        self.used, self.kept = 0, None
        if size > len(self._bytes):
            device = self._bytes.device
            self._bytes = torch.empty(0, dtype=torch.uint8, device=device)  # free the old one first
            self._bytes = torch.empty(size, dtype=torch.uint8, device=device)

    def push(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor with arbitrary values. To remove it, set ``used`` to what it was."""
        size = shape.numel() * dtype.itemsize
        start = -(-self.used // ALIGNMENT) * ALIGNMENT
        if start + size > len(
            self._bytes
        ):  # modules of both models run at the same time, for which the reserved space is too small
            return torch.empty(shape, dtype=dtype, device=self._bytes.device)
        self.used = start + size
        return self._bytes[start : start + size].view(dtype).view(shape)


class OffloadedModel:
    """A model that runs on ``device`` layer by layer, with ``weights`` by their names in its state dict.

    The top module's own parameters stay on the device, because it uses them in methods other than
    ``forward``, where no hook loads them. They are few. Buffers, which are small, stay there, too. Call `compute_in`
    before the model runs.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        buffer: WeightBuffer,
        weights: Weights,
        cast_to: torch.dtype | None = None,
    ):
        self.model, self.buffer = model, buffer
        self._device, self._weights, self._cast_to = device, weights, cast_to
        self._dtype = torch.float32
        model.eval().requires_grad_(False)
        self._computed = self._load_buffers()
        self._own = [name for name, _ in model.named_parameters(recurse=False)]
        self._needed = max((self._offload(child, f"{name}.") for name, child in model.named_children()), default=0)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Choose the dtype of weights and computation; inputs must have it, too."""
        self._dtype = dtype
        self.buffer.reserve(self._needed * dtype.itemsize)
        self.model.to(dtype)
        for module, name, value in self._computed:
            module._buffers[name] = value
        self._load_own()

    def cast_to(self, dtype: torch.dtype | None) -> None:
        """Choose the dtype that weights are cast to before they get the one that the model computes in."""
        if dtype != self._cast_to:
            self._cast_to = dtype
            self._load_own()

    @property
    def loads_as(self) -> tuple[torch.dtype | None, torch.dtype]:
        """The dtypes that decide the values of loaded weights."""
        return self._cast_to, self._dtype

    def load(self, name: str, target: Tensor) -> nn.Parameter:
        """Fill ``target``, on the device, with a weight, and return it as a parameter."""
        stored = self._weights.read(name)
        cast = stored if self._cast_to is None else stored.to(self._cast_to)
        # Move the stored dtype and convert it on the device: fewer bytes, and a GPU is faster at it.
        target.copy_(cast if cast.dtype == target.dtype else cast.to(self._device))
        self._weights.release(name)
        return _parameter(target)

    def _load_buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Put all buffers on the device. Return those that the model computes itself, whose dtype never changes."""
        computed = []
        for path, module in self.model.named_modules():
            for name, value in module.named_buffers(recurse=False):
                if name in module._non_persistent_buffers_set:
                    module._buffers[name] = value.to(self._device)
                    computed.append((module, name, module._buffers[name]))
                else:
                    full_name = f"{path}{'.' if path else ''}{name}"
                    module._buffers[name] = self._weights.read(full_name).to(self._device)
                    self._weights.release(full_name)
        return computed

    def _load_own(self) -> None:
        for name in self._own:
            shape = self.model._parameters[name].shape
            target = torch.empty(shape, dtype=self._dtype, device=self._device)
            self.model._parameters[name] = self.load(name, target)
        if self._own and hasattr(self.model, "weights_dtype"):
            self.model.weights_dtype = self._cast_to or self._weights.read(self._own[0]).dtype

    def _offload(self, module: nn.Module, prefix: str) -> int:
        """Add hooks to a module or to those in it. Returns the largest number of weights' elements held at once."""
        is_whole = not any(isinstance(each, CONTAINERS) for each in module.modules()) and (
            sum(parameter.nbytes for parameter in module.parameters()) <= MODULE_BYTES[self._device.type]
        )
        places = [
            (each, name, f"{prefix}{path}{'.' if path else ''}{name}")
            for path, each in (module.named_modules() if is_whole else [("", module)])
            for name, _ in each.named_parameters(recurse=False, remove_duplicate=False)
        ]
        if places:
            add_hook_to_module(module, _LayerWeights(self, places))
        size = sum(_parameter_of(each, name).numel() + ALIGNMENT for each, name, _ in places)
        inside = [] if is_whole else [self._offload(each, f"{prefix}{name}.") for name, each in module.named_children()]
        return size + max(inside, default=0)


class _LayerWeights(ModelHook):  # type: ignore[misc]
    """Gives a module its weights while it runs. ``places``: modules, their parameters' names, and the full names."""

    def __init__(self, model: OffloadedModel, places: list[tuple[nn.Module, str, str]]):
        self._model, self._places = model, places

    def init_hook(self, module: nn.Module) -> nn.Module:
        for each, name, _ in self._places:
            each._parameters[name] = _parameter(torch.empty_like(_parameter_of(each, name), device="meta"))
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        buffer = self._model.buffer
        self._used_before = buffer.used
        # On the meta device, but of the same dtype, which transformers reads before the layer runs.
        self._empty = [_parameter_of(each, name) for each, name, _ in self._places]
        key = self, self._model.loads_as
        if self._used_before == 0 and buffer.kept is not None and buffer.kept.key == key:
            buffer.used = buffer.kept.end
            self._put(buffer.kept.weights)
            return args, kwargs
        shapes = zip(self._places, self._empty, strict=True)
        weights = [self._model.load(name, buffer.push(empty.shape, empty.dtype)) for (_, _, name), empty in shapes]
        if self._used_before == 0:
            buffer.kept = _Kept(key, weights, buffer.used)
        self._put(weights)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._put(self._empty)
        size = self._model.buffer.used - self._used_before
        self._model.buffer.used = self._used_before
        if size >= TRIM_BYTES:
            return_freed_buffers()
        return output

    def _put(self, parameters: list[nn.Parameter]) -> None:
        for (each, name, _), parameter in zip(self._places, parameters, strict=True):
            each._parameters[name] = parameter


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    parameter: nn.Parameter = getattr(module, name)
    return parameter
