"""The device that a verification runs on, and the versions of the libraries.

A GPU is used only if it has computed something small correctly. One that fails proves nothing about an output, then or
later: "auto" falls back to the CPU and reports why, and a GPU that the user has named is an error with its cause.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import torchvision
import transformers
from torch.nn import functional

from streamconv._version import __version__
from streamconv.errors import UsageError
from streamconv.verification.image import open_image
from streamconv.verification.machine import is_out_of_gpu_memory
from streamconv.verification.preflight import check_reference

CPU = torch.device("cpu")
# Variables that choose the GPUs which a process sees: of CUDA, and of ROCm, which has CUDA's, too.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# What CUDA raises: since torch 2.8, a class of its own. cuBLAS and cuDNN raise RuntimeError.
GPU_ERRORS = (torch.cuda.OutOfMemoryError, *([torch.AcceleratorError] if hasattr(torch, "AcceleratorError") else []))


@dataclass(frozen=True)
class Choice:
    """A device. ``note`` is why "auto" chose the CPU although there is a GPU; "" if it did not."""

    device: torch.device
    note: str = ""


class GpuFailure(Exception):
    """A GPU does not work, for the reason ``cause``; ``remedy`` is what the user can do, as an imperative."""

    def __init__(self, cause: str, remedy: str = "Check the GPU and its driver"):
        self.cause, self.remedy = cause, remedy
        super().__init__(cause)

    def as_usage_error(self, name: str) -> UsageError:
        return UsageError(f"{name} cannot be used: {self.cause}. {self.remedy}, or use --device cpu.")

    def as_note(self) -> str:
        return f"verified on the CPU, because the GPU cannot be used: {self.cause}"


def choose_device(name: str) -> Choice:
    """Choose the device called ``name``; "auto" is the GPU that torch uses by default, if it works.

    Raises:
        UsageError: there is no such device, or it does not work.
    """
    if name == "cpu":
        return Choice(CPU)
    try:
        return Choice(_working_gpu("cuda" if name == "auto" else name))
    except GpuFailure as failure:
        if name != "auto":
            raise failure.as_usage_error(name) from failure
        return Choice(CPU, failure.as_note() if _has_gpu() else "")


def _working_gpu(name: str) -> torch.device:
    """Start CUDA, or ROCm under the same name in torch, and let the GPU compute something.

    Raises:
        UsageError: it is not a GPU's name.
        GpuFailure: torch or the driver does not work with GPUs, or there is no such GPU, or it does not compute.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is not a device. Use auto, cpu, cuda or cuda:N.") from None
    if device.type != "cuda":
        raise UsageError(f"streamconv cannot verify on the device {name!r}. Use auto, cpu, cuda or cuda:N.")
    if torch.version.cuda is None and torch.version.hip is None:
        raise GpuFailure(f"torch {torch.__version__} was built without CUDA", "Install a torch with CUDA")
    try:
        current = torch.cuda.current_device()  # starts CUDA; before, some functions of torch refuse a device
        count = torch.cuda.device_count()
    except Exception as error:  # RuntimeError, AssertionError, or a warning that the caller has made an error
        hidden = [f"{variable}={os.environ[variable]!r}" for variable in VISIBLE if variable in os.environ]
        remedy = f"Unset {' and '.join(hidden)}, which may hide GPUs" if hidden else "Check the GPU and its driver"
        raise GpuFailure(f"torch does not start {_runtime()} ({_first_line(error)})", remedy) from error
    index = current if device.index is None else device.index
    if index >= count:
        raise GpuFailure(f"torch finds {count} GPU{'s' * (count > 1)}, numbered from cuda:0", "Choose one of them")
    device = torch.device("cuda", index)
    prove(device)
    return device


def prove(device: torch.device) -> None:
    """Let a GPU compute products and a convolution of small integers, which are exact in every order.

    Raises:
        GpuFailure: it cannot, or the result is wrong.
    """
    try:
        for dtype in (torch.float32, torch.float64):
            numbers = torch.arange(64, dtype=dtype, device="cpu").reshape(8, 8)
            on_gpu = numbers.to(device)
            convolved = functional.conv2d(on_gpu[None, None], on_gpu[None, None, :2, :2]).cpu()
            is_right = torch.equal((on_gpu @ on_gpu).cpu(), numbers @ numbers) and torch.equal(
                convolved, functional.conv2d(numbers[None, None], numbers[None, None, :2, :2])
            )
            if not is_right:
                raise GpuFailure(f"{_model_of(device)} computes wrong results")
    except RuntimeError as error:
        if is_out_of_gpu_memory(error):
            raise out_of_memory(error) from error
        raise GpuFailure(f"{_model_of(device)} does not compute ({_first_line(error)})") from error


def out_of_memory(error: BaseException) -> GpuFailure:
    # torch's line has ten sentences. The third says how much is free; the others are about settings of its allocator.
    cause = ". ".join(_first_line(error).split(". ")[:3])
    return GpuFailure(f"it has too little free memory ({cause})", "Free the GPU's memory")


def failure_behind(error: Exception, device: torch.device) -> GpuFailure | None:
    """The failure of a GPU that has caused ``error``, by the error's class; or because it does not compute any more.

    An error of CUDA is usually one of all later calls, too. None means that the GPU works, or that it recovered: then
    only running the same on a CPU can show whether the models caused the error.
    """
    if is_out_of_gpu_memory(error):
        return out_of_memory(error)
    if isinstance(error, GPU_ERRORS):
        return GpuFailure(f"it failed while the models ran ({_first_line(error)})")
    try:
        prove(device)
    except GpuFailure as failure:
        return failure
    return None


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """The GPU for JSON, with its memory in bytes; empty for a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "driver": _driver_version(),
        "runtime": _runtime(),
    }


def _runtime() -> str:
    return f"ROCm {torch.version.hip}" if torch.version.hip is not None else f"CUDA {torch.version.cuda}"


def _driver_version() -> str | None:
    """The version of the GPU's driver, if the system shows it."""
    module = "nvidia" if torch.version.hip is None else "amdgpu"
    try:
        return Path(f"/sys/module/{module}/version").read_text().strip()
    except OSError:
        pass  # a sandbox, or a driver that is part of the Linux kernel
    program = shutil.which("nvidia-smi") if module == "nvidia" else None
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


def _model_of(device: torch.device) -> str:
    """The GPU's name and compute capability, and the architectures that torch has kernels for."""
    try:
        major, minor = torch.cuda.get_device_capability(device)
        kernels = ", ".join(torch.cuda.get_arch_list())
        return f"{torch.cuda.get_device_name(device)} of capability {major}.{minor} (torch has kernels for {kernels})"
    except Exception:  # a lost GPU has no properties, either
        return str(device)


def _has_gpu() -> bool:
    """Return whether the system shows a GPU that some build of torch could use."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or os.path.exists("/dev/kfd")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")


def versions() -> dict[str, str]:
    """The versions of streamconv and of the libraries that the models run with."""
    packages = (torch, torchvision, transformers, accelerate)
    return {"streamconv": __version__, **{package.__name__: str(package.__version__) for package in packages}}


def check_arguments_here(device: str, reference: str, image: str | None) -> None:
    """Check in this process that the device works, and that the reference and the image exist.

    Raises:
        UsageError: that is not so.
    """
    choose_device(device)
    check_reference(reference)
    open_image(image)
