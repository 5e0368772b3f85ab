"""The device that a verification runs on, the memory that it takes there, the versions that it ran with.

As a program, ``python -m streamconv.verification.devices DEVICE REFERENCE [IMAGE]`` says whether all of
them exist: the command line asks it before a conversion, in a process of its own, so that the
conversion's stays free of torch.
"""

import re
import sys
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

LOOK_SECONDS = 0.02  # the kernel keeps no peak of anonymous memory


def choose_device(name: str) -> torch.device:
    """The device that ``name`` means; "auto" takes a GPU where there is one. TF32 is switched off.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is no device. Use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda") or name.startswith("cpu:"):
        raise UsageError(f"{name!r} is no device that streamconv verifies on. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"{name} was asked for, and torch finds no CUDA GPU here. Use --device cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"{name} was asked for, and there are {torch.cuda.device_count()} GPUs, from cuda:0 on.")
        # TF32 keeps 10 bits of a product's mantissa: it would drown what is looked for.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return device


def versions() -> dict[str, str]:
    packages = (torch, torchvision, transformers, accelerate)
    return {"streamconv": __version__, **{package.__name__: package.__version__ for package in packages}}


class MemoryWatch:
    """The memory of this process and of a GPU within a ``with`` statement, in bytes; looked at every `LOOK_SECONDS`.

    Pages of mapped files count in a process's resident memory although the system takes them back
    when it needs them; its anonymous memory is what a small machine must have. Linux tells both.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._start = _status()
        self._anonymous = self._start.get("RssAnon")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="memory", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        anonymous = _status().get("RssAnon")
        if anonymous is not None and self._anonymous is not None:
            self._anonymous = max(self._anonymous, anonymous)

    def as_dict(self) -> dict[str, int | None]:
        """For JSON: resident memory after torch's start, peaks of resident and anonymous memory, and of the GPU's."""
        self._look()
        return {
            "host_start": self._start.get("VmRSS"),
            "host_anonymous_start": self._start.get("RssAnon"),
            "host_peak": _status().get("VmHWM"),
            "host_anonymous_peak": self._anonymous,
            "gpu_peak": torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None,
        }


def _status() -> dict[str, int]:
    """This process's memory in bytes, by the names of proc_pid_status(5); nothing where there is no such file."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    return {name: int(value) << 10 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def check_arguments_here(device: str, reference: str, image: str | None) -> None:
    """
    Raises:
        UsageError: the device, the reference or the image does not exist.
    """
    choose_device(device)
    check_reference(reference)
    open_image(image)


if __name__ == "__main__":
    try:
        check_arguments_here(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
    except UsageError as error:
        print(error)  # on stdout: libraries warn on stderr
        sys.exit(error.exit_code)
