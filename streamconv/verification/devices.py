"""The device that a verification runs on, its peak memory, and the versions of the libraries."""

import re
import threading
from pathlib import Path

import accelerate
import torch
import torchvision
import transformers

from streamconv._version import __version__
from streamconv.errors import UsageError
from streamconv.verification.image import open_image
from streamconv.verification.reference import check_reference

SAMPLE_SECONDS = 0.02  # sampled, because the kernel records no peak of anonymous memory


def choose_device(name: str) -> torch.device:
    """Choose the torch device called ``name``; "auto" is a GPU if there is one.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is not a device. Use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda") or name.startswith("cpu:"):
        raise UsageError(f"streamconv cannot verify on the device {name!r}. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"torch finds no CUDA GPU, so {name} cannot be used. Use --device cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            last = torch.cuda.device_count() - 1
            raise UsageError(f"There is no {name}: the devices are cuda:0 to cuda:{last}.")
    return device


def versions() -> dict[str, str]:
    """The versions of streamconv and of the libraries that the models run with."""
    packages = (torch, torchvision, transformers, accelerate)
    return {"streamconv": __version__, **{package.__name__: str(package.__version__) for package in packages}}


class MemoryWatch:
    """Peak memory of this process, with all its threads, and of a GPU during a ``with`` statement, in bytes.

    Resident memory includes pages of mapped files, which the system takes back when it needs them. A small
    machine must have enough for the anonymous memory only. Linux reports both; other systems, neither.
    torch's own record of a GPU's peak belongs to the caller, too, and is not reset.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._start = _status()
        self._anonymous_peak = self._start.get("RssAnon")
        self._gpu_peak_before = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        self._gpu_peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="memory", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample_until_stopped(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        anonymous = _status().get("RssAnon")
        if anonymous is not None and self._anonymous_peak is not None:
            self._anonymous_peak = max(self._anonymous_peak, anonymous)
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)  # exact, if it is a new one
            now = peak if peak > self._gpu_peak_before else torch.cuda.memory_allocated(self._device)
            self._gpu_peak = max(self._gpu_peak, now)

    def as_dict(self) -> dict[str, int | None]:
        """Bytes for JSON: memory when the watch began (with torch imported), and the peaks."""
        self._sample()
        return {
            "host_start": self._start.get("VmRSS"),
            "host_anonymous_start": self._start.get("RssAnon"),
            "host_peak": _status().get("VmHWM"),
            "host_anonymous_peak": self._anonymous_peak,
            "gpu_peak": self._gpu_peak if self._device.type == "cuda" else None,
        }


def _status() -> dict[str, int]:
    """This process's memory in bytes, with the names of proc_pid_status(5); empty on systems without that file."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    return {name: int(value) << 10 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def check_arguments_here(device: str, reference: str, image: str | None) -> None:
    """Check in this process that the device, the reference and the image exist.

    Raises:
        UsageError: one of them does not.
    """
    choose_device(device)
    check_reference(reference)
    open_image(image)
