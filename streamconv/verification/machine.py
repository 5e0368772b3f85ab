"""Failures of the machine that runs the models. They say nothing about the output, so they are no check's result.

A conversion alone imports this module, too, so torch is imported only on use.
"""

import errno

from streamconv.errors import UsageError

AGAIN = "Then run the same command again; a finished conversion is not repeated."
OUT_OF_MEMORY = f"Close other programs, or use a machine with more memory. {AGAIN}"
_OF_A_LIMIT = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN})


def is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # For a CPU's memory, torch has no class of its own: only the allocator's name tells.
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)


def refuse_machine_failure(error: Exception, device: str = "cpu") -> None:
    """Raise an error if ``error``, which a check caught, is a failure of the machine.

    Raises:
        UsageError: too little memory, or a limit on files or processes.
    """
    if is_out_of_memory(error):
        raise UsageError(f"{device} has too little memory to run the models: {error}. {OUT_OF_MEMORY}") from error
    if isinstance(error, OSError) and error.errno in _OF_A_LIMIT:
        raise UsageError(f"A limit of the system was reached: {error.strerror}. Raise it. {AGAIN}") from error
