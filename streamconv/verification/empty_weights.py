"""Builds models whose weights need no memory, without a change that another thread could see.

accelerate's ``init_empty_weights``, and transformers while it loads a model, replace methods of torch's
modules, torch's initializers and the default dtype for the whole process. Another thread that builds a model
meanwhile gets one without weights, and two such calls at the same time leave the replacements in place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ALLOCATING = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}
# Models compute with these values while they are built, for buffers or for the sizes of their layers.
_COMPUTED = {torch.arange, torch.linspace}


class _CreationMode(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ALLOCATING:
            kwargs = {**kwargs, "dtype": kwargs.get("dtype") or self._dtype}
        elif func in _COMPUTED:
            kwargs = {**kwargs, "device": kwargs.get("device") or "cpu"}
        return func(*args, **kwargs)


@contextmanager
def empty_weights(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Create weights on the meta device and in ``dtype``, within the ``with`` statement and in its thread only."""
    with torch.device("meta"), _CreationMode(dtype):
        yield
