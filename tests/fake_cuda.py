"""A CUDA device for tests, without a GPU: its tensors hold real numbers, and refuse to meet those of other devices.

    with FakeCuda(count=2) as gpu:
        found = api.verify(folder, source, device="cuda:1")
    assert gpu.caches_emptied == 0

The numbers are computed on the CPU. So this shows where tensors are, what is moved, what is held at once, and what
happens after an error; it does not show how a GPU rounds, nor how fast it is. On an H200, tensors took 36 MB more,
nearly all of it cuBLAS's workspace; so much is missing from ``peak``.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CPU = torch.device("cpu")
aten = torch.ops.aten
CONTEXT_BYTES = 695 << 20  # what CUDA and its libraries took for themselves on an H200
# On a machine with real GPUs, torch asks the driver about a device before it computes on it.
two_gpus = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="torch refuses a fake GPU beside a real one")
CudaError: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)


def no_memory_for_cuda() -> RuntimeError:
    """The error of a GPU whose free memory is too small for CUDA itself."""
    error = CudaError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported …")
    error.error_code = 2  # type: ignore[attr-defined]
    return error


def no_memory_for_cublas() -> RuntimeError:
    return RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


class CudaTensor(Tensor):
    """A tensor of a fake GPU. ``values`` is on the CPU; a view's values are a view of its base's."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> "CudaTensor":
        tensor: CudaTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=device,
        )  # fmt: skip
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function} of a fake GPU's tensor, but the fake GPU is gone")


class FakeCuda(TorchDispatchMode):
    """Fake GPUs within a ``with`` statement: for tensors in its thread, for functions of `torch.cuda` in all.

    Args:
        count: The number of GPUs.
        memory: The bytes that tensors may occupy on each; more raises what torch raises.
        fail: Called with the name of each operation on a GPU, such as "aten.addmm"; it may raise what CUDA would.

    Attributes:
        moved: Bytes moved from the CPU to a GPU, by the dtype in which they are moved.
        read_back: The number of times that the CPU waits for a GPU's values.
        allocated: The bytes that tensors occupy on all GPUs now.
        peak: The largest number of bytes that they have occupied.
        used: The GPUs that computed something.
        caches_emptied: The number of calls of ``torch.cuda.empty_cache``.
    """

    def __init__(self, count: int = 1, memory: int | None = None, fail: Callable[[str], None] = lambda operation: None):
        super().__init__()
        self.count, self.memory, self.fail = count, memory, fail
        self.moved: Counter[torch.dtype] = Counter()
        self.used: set[str] = set()
        self.read_back = self.allocated = self.peak = self.caches_emptied = 0
        self.is_started = False
        self._live: Counter[int] = Counter()  # tensors of each storage, by address
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves, _ = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        requested = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        on_gpus = {x.device for x in inputs if isinstance(x, CudaTensor)}
        is_copy = function in (aten._to_copy.default, aten.copy_.default)
        # A tensor without dimensions counts as a number, which any device accepts.
        others = {x.device for x in inputs if not isinstance(x, CudaTensor) and (x.dim() or x.device.type == "meta")}
        if not is_copy and on_gpus and len(on_gpus | others) > 1:
            devices = ", ".join(sorted(map(str, on_gpus | others)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {function} got {devices}")
        if requested is None:
            target = args[0].device if function is aten.copy_.default else next(iter(on_gpus), CPU)
        else:
            target = self._device(requested) if requested.type == "cuda" else requested
        if target.type == "cuda" or on_gpus:
            self.is_started = True
            self.fail(str(function).rpartition(".")[0])
        if target.type == "cuda":
            self.used.add(str(target))
            if "device" in kwargs:
                kwargs["device"] = CPU
        for x in inputs:
            assert not isinstance(x, CudaTensor) or x.values.dtype == x.dtype, (
                f"{function} of a tensor with stale values"
            )
        wrapper_of = {id(x.values): x for x in inputs if isinstance(x, CudaTensor)}
        plain_args, plain_kwargs = tree_map_only(CudaTensor, lambda x: x.values, (args, kwargs))
        result = function(*plain_args, **plain_kwargs)
        self._count(function, target, on_gpus, others, result)
        if target.type != "cuda":
            return result
        return tree_map_only(
            Tensor, lambda x: wrapper_of[id(x)] if id(x) in wrapper_of else self._wrapped(x, target), result
        )

    def _device(self, device: torch.device) -> torch.device:
        index = device.index or 0
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def _count(self, function: Any, target: torch.device, on_gpus: set[Any], others: set[Any], result: Any) -> None:
        if function in (aten._local_scalar_dense.default, aten.equal.default) or target.type == "cpu":
            self.read_back += bool(on_gpus)
        if target.type == "cuda" and CPU in others:
            # torch converts before it moves, so what is moved has the dtype of the result.
            self.moved[result.dtype] += result.nbytes

    def _wrapped(self, values: Tensor, device: torch.device) -> CudaTensor:
        storage = values.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._sizes:
            if self.memory is not None and self.allocated + size > self.memory:
                raise torch.cuda.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size}.00 B. GPU {device.index} has a total capacity of "
                    f"{self.memory}.00 B of which {self.memory - self.allocated}.00 B is free. Including non-PyTorch "
                    "memory, this process has 1.03 GiB memory in use. If reserved but unallocated memory is large …"
                )
            self._sizes[address] = size
            self.allocated += size
        tensor = CudaTensor(values, device)
        self._live[address] += 1
        weakref.finalize(tensor, self._free, address)
        self.peak = max(self.peak, self.allocated)
        return tensor

    def _free(self, address: int) -> None:
        self._live[address] -= 1
        if not self._live[address]:
            del self._live[address]
            self.allocated -= self._sizes.pop(address)

    def __enter__(self) -> "FakeCuda":
        torch._C._ensureCUDADeviceGuardSet()  # allows to name a device that does not exist
        with ExitStack() as stack:
            for name, value in self._functions().items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0"))
            stack.enter_context(_Attention())
            self._stack = stack.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._stack.close()

    def _functions(self) -> dict[str, Any]:
        """The functions of `torch.cuda` that a verification calls."""

        def start() -> None:
            self.fail("init")
            self.is_started = True

        def started(value: Callable[[], Any]) -> Callable[..., Any]:
            def function(device: Any = None) -> Any:
                if not self.is_started:
                    raise RuntimeError("Invalid device argument: did you call init?")
                return value()

            return function

        def current_device() -> int:
            start()
            return 0

        properties = SimpleNamespace(name="Fake GPU", major=9, minor=0, total_memory=80 << 30)
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: self.is_started,
            "init": start,
            "_lazy_init": start,
            "device_count": lambda: self.count,
            "current_device": current_device,
            "synchronize": started(lambda: None),
            "empty_cache": started(lambda: setattr(self, "caches_emptied", self.caches_emptied + 1)),
            "memory_allocated": started(lambda: self.allocated),
            "memory_reserved": started(lambda: self.allocated),
            "max_memory_allocated": started(lambda: self.peak),
            "max_memory_reserved": started(lambda: self.peak),
            "reset_peak_memory_stats": started(lambda: setattr(self, "peak", self.allocated)),
            "mem_get_info": started(lambda: ((80 << 30) - CONTEXT_BYTES - self.allocated, 80 << 30)),
            "get_device_properties": started(lambda: properties),
            "get_device_name": started(lambda: properties.name),
            "get_device_capability": started(lambda: (properties.major, properties.minor)),
            "get_arch_list": lambda: ["sm_90"],
        }


class _Attention(TorchFunctionMode):
    """Computes attention by its formula, because torch would ask the GPU which kernel it has."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention and isinstance(args[0], CudaTensor):
            query, key, value = args[:3]
            assert kwargs.get("attn_mask") is None
            assert not kwargs.get("dropout_p")
            assert not kwargs.get("is_causal")
            scores = query @ key.transpose(-2, -1) * (kwargs.get("scale") or query.shape[-1] ** -0.5)
            return scores.softmax(-1) @ value
        return function(*args, **kwargs)
