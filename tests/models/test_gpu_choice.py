"""A GPU is used if it works, and otherwise reported with the cause; none of it needs a real GPU."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch

from streamconv import UsageError, VerificationOptions
from streamconv.verification import devices
from streamconv.verification.devices import CPU, choose_device, describe_gpu
from streamconv.verification.memory import MemoryWatch
from tests.fake_cuda import CONTEXT_BYTES, CudaError, FakeCuda, no_memory_for_cublas, no_memory_for_cuda, two_gpus


def failing(operation: str, error: Exception) -> Callable[[str], None]:
    def fail(name: str) -> None:
        if name == operation:
            raise error

    return fail


@contextmanager
def broken(fail: Callable[[str], None] = lambda operation: None, **versions: None) -> Iterator[None]:
    """Yield in a process with a GPU that fails, or with a torch without these ``versions``."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(devices, "_has_gpu", return_value=True))
        stack.enter_context(FakeCuda(fail=fail))
        for name in versions:
            stack.enter_context(mock.patch.object(torch.version, name, None))
        yield


BROKEN = {
    "unsupported architecture": (
        {"fail": failing("aten.mm", CudaError("CUDA error: no kernel image is available\nFor debugging …"))},
        "Fake GPU of capability 9.0 (torch has kernels for sm_90) does not compute (CUDA error: no kernel image is "
        "available)",
    ),
    "no memory": (
        {"fail": failing("aten._to_copy", torch.cuda.OutOfMemoryError("CUDA out of memory"))},
        "it has too little free memory (CUDA out of memory). Free the GPU's memory, or use",
    ),
    "no memory for CUDA": (
        {"fail": failing("aten._to_copy", no_memory_for_cuda())},
        "it has too little free memory (CUDA error: out of memory). Free the GPU's memory, or use",
    ),
    "no memory for cuBLAS": (
        {"fail": failing("aten.mm", no_memory_for_cublas())},
        "it has too little free memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`). "
        "Free the GPU's memory, or use",
    ),
    "lost context": (
        {"fail": failing("aten.convolution", CudaError("CUDA error: unspecified launch failure"))},
        "does not compute (CUDA error: unspecified launch failure)",
    ),
    "no cuDNN": (
        {"fail": failing("aten.convolution", RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"))},
        "does not compute (cuDNN error: CUDNN_STATUS_NOT_INITIALIZED)",
    ),
    "old driver": (
        {"fail": failing("init", RuntimeError("The NVIDIA driver on your system is too old (found version 9000)."))},
        "torch does not start CUDA 13.0 (The NVIDIA driver on your system is too old (found version 9000))",
    ),
    "torch without CUDA": ({"cuda": None, "hip": None}, f"torch {torch.__version__} was built without CUDA"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_gpu_is_an_error_if_named_and_a_note_otherwise(name: str) -> None:
    changes, cause = BROKEN[name]
    with broken(**changes), pytest.raises(UsageError) as caught:
        choose_device("cuda:0")
    assert cause.replace("13.0", str(torch.version.cuda or "13.0")) in str(caught.value)
    assert str(caught.value).startswith("cuda:0 cannot be used: ")
    assert str(caught.value).endswith(", or use --device cpu.")
    with broken(**changes):
        choice = choose_device("auto")
        assert choose_device("cpu") == devices.Choice(CPU)
    assert choice.device == CPU
    assert "verified on the CPU, because the GPU cannot be used: " in choice.note
    assert "\n" not in choice.note


def test_of_torchs_message_about_memory_only_the_sizes_are_shown() -> None:
    with FakeCuda(memory=100), pytest.raises(UsageError) as caught:
        choose_device("cuda")
    sizes = "Tried to allocate 256.00 B. GPU 0 has a total capacity of 100.00 B of which 100.00 B is free"
    assert str(caught.value) == (
        f"cuda cannot be used: it has too little free memory (CUDA out of memory. {sizes}). Free the GPU's memory, "
        "or use --device cpu."
    )


def test_gpu_that_computes_wrong_results_is_not_used() -> None:
    wrong = mock.patch.object(torch, "equal", return_value=False)
    with FakeCuda(), wrong, pytest.raises(UsageError, match="computes wrong results"):
        choose_device("cuda")


def test_machine_without_a_gpu_uses_the_cpu_without_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_has_gpu", lambda: False)
    with FakeCuda(fail=failing("init", RuntimeError("no driver"))):
        assert choose_device("auto") == devices.Choice(CPU)


def test_hidden_gpu_is_named_with_the_variable_that_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    hidden = FakeCuda(fail=failing("init", RuntimeError("No CUDA GPUs are available")))
    with hidden, pytest.raises(UsageError, match="Unset CUDA_VISIBLE_DEVICES='7', which may hide GPUs, or use"):
        choose_device("cuda")


@two_gpus
def test_index_chooses_a_gpu_at_once() -> None:
    with FakeCuda(count=2) as gpu:
        device = choose_device("cuda:1").device
        with MemoryWatch(device) as watch:
            assert watch.as_dict()["gpu_peak"] is not None
    assert device == torch.device("cuda", 1)
    assert gpu.used == {"cuda:1"}


def test_missing_index_is_refused() -> None:
    with FakeCuda(count=2), pytest.raises(UsageError, match="torch finds 2 GPUs, numbered from cuda:0"):
        choose_device("cuda:2")
    with FakeCuda():
        assert choose_device("cuda").device == choose_device("auto").device == torch.device("cuda", 0)


def test_gpu_is_described() -> None:
    with FakeCuda():
        described = describe_gpu(choose_device("auto").device)
        with mock.patch.multiple(torch.version, cuda=None, hip="6.4"):
            assert describe_gpu(torch.device("cuda:0"))["runtime"] == "ROCm 6.4"
            assert choose_device("cuda").device.type == "cuda"
    assert described.keys() == {"name", "capability", "memory", "driver", "runtime"}
    assert (described["name"], described["capability"], described["memory"]) == ("Fake GPU", "9.0", 80 << 30)
    assert described["runtime"].startswith("CUDA ")
    assert describe_gpu(CPU) == {}


def test_peaks_are_those_of_the_watch_and_not_of_earlier_work() -> None:
    with FakeCuda():
        device = choose_device("cuda").device
        torch.ones(2 << 20, device=device)
        with MemoryWatch(device) as watch:
            kept = torch.ones(1 << 20, device=device)
            found = watch.as_dict()
    assert found["gpu_peak"] == found["gpu_reserved_peak"] == kept.nbytes
    assert found["gpu_used_peak"] == kept.nbytes + CONTEXT_BYTES
    assert found["host_peak"] is None or found["host_peak"] > 0


def test_lost_gpu_does_not_stop_the_watch() -> None:
    with FakeCuda():
        device = choose_device("cuda").device
        lost = mock.patch.object(torch.cuda, "mem_get_info", side_effect=CudaError("lost"))
        with lost, MemoryWatch(device) as watch:
            assert watch.as_dict()["gpu_used_peak"] is None


@pytest.mark.parametrize(("device", "why"), [("mps", "Apple's GPUs have no float64"), ("xpu:0", "no float64")])
def test_gpus_without_float64_are_refused_with_the_reason(device: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        VerificationOptions(device=device)
