"""Detects failures of the machine that runs the models. They prove nothing about the output, so no check reports them.

A conversion imports this module, too, so torch is imported only when it is needed.
"""

import errno

from streamconv.errors import LIMIT_ERRORS, UsageError

AGAIN = "Then run the same command again; a finished conversion is not repeated."
ALLOCATION_FAILED = 2  # cudaErrorMemoryAllocation of CUDA, hipErrorOutOfMemory of ROCm
LIBRARY_ALLOCATION_FAILED = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
OUT_OF_MEMORY = f"Close other programs, or use a machine with more memory. {AGAIN}"


def is_out_of_gpu_memory(error: Exception) -> bool:
    """Return whether torch, CUDA or one of its libraries could not allocate memory on a GPU.

    torch raises its own error for tensors only. CUDA, cuBLAS and cuDNN also need memory when they start.
    """
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    # CUDA's own errors have a code, since torch 2.8; those of libraries, only the name of a status in the message.
    return isinstance(error, RuntimeError) and (
        getattr(error, "error_code", None) == ALLOCATION_FAILED
        or any(name in str(error) for name in LIBRARY_ALLOCATION_FAILED)
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether Python, the system or torch could not allocate memory, on the CPU or a GPU."""
    if is_out_of_gpu_memory(error) or isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's CPU allocator raises a plain RuntimeError, so its name in the message is the only sign. If torch rewords
    # the message, the check fails and shows it.
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)


def refuse_machine_failure(error: Exception, device: str = "cpu") -> None:
    """Raise an error if ``error``, which a check caught, is a failure of the machine.

    Raises:
        UsageError: too little memory, or a limit on files or processes.
    """
    if is_out_of_memory(error):
        raise UsageError(f"{device} has too little memory to run the models: {error}. {OUT_OF_MEMORY}") from error
    if isinstance(error, OSError) and error.errno in LIMIT_ERRORS:
        raise UsageError(f"A system limit was reached: {error.strerror}. Raise the limit. {AGAIN}") from error
