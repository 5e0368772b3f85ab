"""Peak memory of this process and of a GPU while models run."""

import re
import threading
from pathlib import Path

import torch

SAMPLE_SECONDS = 0.02  # sampled, because the kernel records no peak of anonymous memory


class MemoryWatch:
    """Peak memory of this process, with all its threads, and of a GPU during a ``with`` statement, in bytes.

    Resident memory includes pages of mapped files, which the system takes back when it needs them. A small
    machine must have enough for the anonymous memory only. Linux reports both; other systems, neither.
    """

    def __init__(self, device: torch.device):
        self._start = _status()
        self._anonymous_peak = self._start.get("RssAnon")
        self._gpu = _GpuWatch(device) if device.type == "cuda" else None
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
        if self._gpu is not None:
            self._gpu.sample()

    def as_dict(self) -> dict[str, int | None]:
        """Bytes for JSON: memory when the watch began (with torch imported), and the peaks.

        "gpu_peak" is what tensors occupy, "gpu_reserved_peak" what torch has taken from the GPU for them, and
        "gpu_used_peak" all that is used of the GPU: with the CUDA context, the libraries, and other processes.
        """
        self._sample()
        return {
            "host_start": self._start.get("VmRSS"),
            "host_anonymous_start": self._start.get("RssAnon"),
            "host_peak": _status().get("VmHWM"),
            "host_anonymous_peak": self._anonymous_peak,
            "gpu_peak": self._gpu.allocated if self._gpu is not None else None,
            "gpu_reserved_peak": self._gpu.reserved if self._gpu is not None else None,
            "gpu_used_peak": self._gpu.used if self._gpu is not None else None,
        }


class _GpuWatch:
    """The peaks of a GPU. torch's own record of them belongs to the caller, too, and is not reset."""

    def __init__(self, device: torch.device):
        self._device = device
        self._before = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        self.allocated = self.reserved = 0
        self.used: int | None = None

    def sample(self) -> None:
        device = self._device
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        # A new record is exact. An older one may be higher than the peak since.
        self.allocated = max(
            self.allocated, allocated if allocated > self._before[0] else torch.cuda.memory_allocated(device)
        )
        self.reserved = max(
            self.reserved, reserved if reserved > self._before[1] else torch.cuda.memory_reserved(device)
        )
        try:
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError:  # the GPU has failed, which the models that run on it report
            return
        self.used = max(self.used or 0, total - free)


def _status() -> dict[str, int]:
    """This process's memory in bytes, with the names of proc_pid_status(5); empty on systems without that file."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    return {name: int(value) << 10 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
