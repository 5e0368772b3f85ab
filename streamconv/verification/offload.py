"""Runs a model whose weights stay in their file: a layer's weights are on the device only while the layer runs.

A hook for accelerate loads and releases them, on a CPU as on a GPU, so that the device needs memory for one layer, not
for the model. A forward pass uses every weight once, so none is loaded twice. accelerate's own hook for this changes an
environment variable, which other threads see, and collects garbage for every weight.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from streamconv.files.reader import Reader
from streamconv.planning.shards import PIECE_BYTES
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.expressions import AnyTensor, parts_of, prefetch
from streamconv.tensors.info import DTYPES
from streamconv.verification.page_cache import FileMappings, return_freed_buffers

RECENT_BYTES = 128 << 20  # mapped pages kept for the running layer; a block of ViT-g has 113 MB
LARGE_BYTES = 1 << 20  # of a layer after which freed buffers are returned to the system
READ_BYTES = 32 << 20  # read at once from a streamed source


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype for a safetensors code, such as "BF16"."""
    dtype: torch.dtype = getattr(torch, DTYPES[code].torch)
    return dtype


class OffloadedWeights(Mapping[str, Tensor]):
    """A state dict of tensors mapped from a file. Looking one up returns it on ``device``, in ``dtype``.

    If the conversion cast them (``cast_to``), they are cast first, too. The result is the mapped tensor
    itself if no cast is needed and oneDNN multiplies it. MKL may round differently depending on a
    tensor's alignment, which is arbitrary in a file, so it gets a copy.
    """

    def __init__(
        self, mapped: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, cast_to: torch.dtype | None = None
    ):
        self.mapped, self.device, self.dtype, self.cast_to = mapped, device, dtype, cast_to
        self._files = FileMappings()
        self._recent: deque[Tensor] = deque()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.mapped[name]
        self._files.will_need(tensor)
        self._recent.append(tensor)
        while len(self._recent) > 1 and sum(tensor.nbytes for tensor in self._recent) > RECENT_BYTES:
            self._files.release(self._recent.popleft())
        if self.cast_to is not None:
            tensor = tensor.to(self.cast_to)
        return tensor.to(self.device, self.dtype, copy=not _has_onednn())

    def __iter__(self) -> Iterator[str]:
        return iter(self.mapped)

    def __len__(self) -> int:
        return len(self.mapped)


class StreamedWeights(Mapping[str, Tensor]):
    """A state dict of a checkpoint's tensors, local or remote, which are read when they are looked up.

    Models use their tensors in about the order of ``tensors``. So the next ones are read at the same time and kept
    for a while, in the dtype that each is cast to. Records that are read completely are checked against their CRC-32.
    """

    def __init__(
        self,
        tensors: Mapping[str, AnyTensor],
        reader: Reader,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.device, self.dtype, self._reader = device, dtype, reader
        self._tensors, self._order = tensors, list(tensors)
        self._recent: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._recent:
            self._read_from(self._order.index(name))
        return self._recent[name].to(self.device, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _read_from(self, first: int) -> None:
        names: list[str] = []
        size = 0
        for name in self._order[first:]:
            size += self._tensors[name].info.nbytes
            if names and (size > READ_BYTES or name in self._recent):
                break
            names.append(name)
        while self._recent and sum(tensor.nbytes for tensor in self._recent.values()) > READ_BYTES:
            del self._recent[next(iter(self._recent))]
        parts = [part for name in names for part in parts_of(self._tensors[name])]
        prefetch(parts, self._reader)
        checks = RecordChecks(self._reader)
        for name in names:
            self._recent[name] = _read_tensor(name, self._tensors[name], self._reader, checks)


def _read_tensor(name: str, tensor: AnyTensor, reader: Reader, checks: RecordChecks) -> Tensor:
    data = torch.empty(tensor.info.nbytes, dtype=torch.uint8)
    view, at = data.numpy().data, 0
    for piece in tensor.split(PIECE_BYTES):
        part = view[at : at + piece.info.nbytes]
        checks.add(name, piece, piece.read_into(part, reader))
        at += len(part)
    return data.view(torch_dtype(tensor.info.dtype)).reshape(tensor.info.shape).to(torch_dtype(tensor.target.dtype))


class _LayerWeights(ModelHook):  # type: ignore[misc]
    """Gives a module its own weights while it runs; ``prefix`` is the module's name in the state dict and a dot."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str):
        self._weights, self._prefix = weights, prefix

    def init_hook(self, module: nn.Module) -> nn.Module:
        self._names = [name for name, _ in module.named_parameters(recurse=False)]
        return self._release(module)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for name in self._names:
            module._parameters[name] = _parameter(self._weights[self._prefix + name])
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._release(module)
        return output

    def _release(self, module: nn.Module) -> nn.Module:
        weights = dict(module.named_parameters(recurse=False))
        is_large = sum(weight.nbytes for weight in weights.values()) >= LARGE_BYTES
        while weights:
            name, weight = weights.popitem()
            # On the meta device, but of the same dtype, which transformers reads before the layer runs.
            module._parameters[name] = _parameter(torch.empty_like(weight, device="meta"))
            del weight
        if is_large:
            return_freed_buffers()
        return module


class OffloadedModel:
    """A model that runs on ``device`` layer by layer, in float32.

    Its parameters are mapped from a file, or come from ``weights``. ``cast_to`` is as in `OffloadedWeights`.
    The top module's own parameters stay on the device, because it uses them in methods other than
    ``forward``, where no hook loads them. They are few.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        weights: "StreamedWeights | None" = None,
        cast_to: torch.dtype | None = None,
    ):
        self.model = model
        self._weights = weights or OffloadedWeights(model.state_dict(), device, torch.float32, cast_to)
        model.eval().requires_grad_(False)
        for prefix, module in model.named_modules():
            for name, value in module.named_buffers(recurse=False):
                module._buffers[name] = value.to(device)
            if module is not model and module._parameters:
                add_hook_to_module(module, _LayerWeights(self._weights, f"{prefix}."))
        self.compute_in(torch.float32)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Switch the dtype of weights and computation; inputs must have it, too."""
        self._weights.dtype = dtype
        self.model.to(dtype)
        for name, _ in self.model.named_parameters(recurse=False):
            self.model._parameters[name] = _parameter(self._weights[name])


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


class _ExactLayers(TorchFunctionMode):
    """Computes some layers in another way than torch would choose, in one thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs or func not in (functional.linear, functional.conv2d) or args[0].dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        if func is functional.linear and args[0].device.type == "cpu" and _has_onednn():
            inputs, weight, bias = (*args, None)[:3]
            return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        if func is functional.conv2d and args[0].device.type == "cuda":
            return convolve_in_float64(*args)
        return func(*args)


def convolve_in_float64(inputs: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """Call ``conv2d``. On a GPU, it rounds float32 to TF32 unless that is switched off for the whole process."""
    bias = None if bias is None else bias.double()
    return functional.conv2d(inputs.double(), weight.double(), bias, *options).float()


def allows_tf32(device: torch.device) -> bool:
    """Check if this process lets a GPU round the factors of float32 matrix products to TF32."""
    if device.type != "cuda":
        return False
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # it was allowed through another interface of torch, `fp32_precision`
        return True


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@contextmanager
def exact_layers() -> Iterator[None]:
    """Compute linear layers with oneDNN on a CPU, and convolutions without TF32 on a GPU.

    torch includes oneDNN. On AMD CPUs it is twice as fast as MKL, torch's choice.
    """
    with _ExactLayers():
        yield
