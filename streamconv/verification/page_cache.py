"""Advice to Linux about weights that are mapped from files, which torch cannot give. A no-op on other systems.

Results do not depend on it, but a small machine is slow without it: pages of weights that are not
needed again displace those of torch itself, and freed buffers stay allocated.
"""

import bisect
import ctypes
import mmap
import re
import sys
from contextlib import suppress
from pathlib import Path

from torch import Tensor

_WILLNEED, _DONTNEED = 3, 4  # madvise(2), on Linux
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def return_freed_buffers() -> None:
    """Make the C library return all freed buffers to the system.

    Otherwise glibc adapts and keeps freed buffers of up to 32 MB: 50 MB while ViT-g runs in float64. mallopt(3) would
    stop that for good, but in the whole process, and could not be undone.
    """
    if _libc is not None and hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


class FileMappings:
    """The parts of this process's memory that are mapped from files when the object is created."""

    def __init__(self) -> None:
        text = ""
        with suppress(OSError):  # some systems and containers do not have it
            text = Path("/proc/self/maps").read_text(errors="replace") if _libc is not None else ""
        # proc_pid_maps(5): start-end, permissions, offset, device, inode (0 for anonymous memory), path.
        mappings = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) r\S+ ([0-9a-f]+) \S+ [1-9]\d* *(.*)$", text, re.MULTILINE)
        self._ranges = [(int(start, 16), int(end, 16)) for start, end, _, _ in mappings]
        self._files = [(int(offset, 16), Path(path)) for _, _, offset, path in mappings]

    def location_of(self, tensor: Tensor) -> tuple[Path, int] | None:
        """The file that a tensor is mapped from and the offset in it; None if that is not known."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        at = bisect.bisect(self._ranges, (start, sys.maxsize)) - 1
        if at < 0 or not tensor.is_contiguous() or end > self._ranges[at][1]:
            return None
        offset, path = self._files[at]
        return path, offset + start - self._ranges[at][0]

    def will_need(self, tensor: Tensor) -> None:
        """Start reading all of the tensor's pages now."""
        self._advise(tensor, _WILLNEED)

    def release(self, tensor: Tensor) -> None:
        """Drop the tensor's pages from this process; they are read from the file again when touched.

        Files are mapped privately, so data written into such a page would be lost. Nothing here writes.
        """
        self._advise(tensor, _DONTNEED)

    def _advise(self, tensor: Tensor, advice: int) -> None:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        # DONTNEED on anonymous memory would lose data: advise only on memory that is known to be mapped from a file.
        if _libc is not None and self.location_of(tensor) is not None:
            start = start // mmap.PAGESIZE * mmap.PAGESIZE
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
