"""Exact float32: a context in which no matrix product or convolution rounds its inputs to TF32 or bfloat16.

TF32 has 10 bits of mantissa, so its rounding would hide the differences that a verification looks for. The setting
belongs to the whole process, and torch has two interfaces to it: since 2.9, ``fp32_precision`` of several backends;
before, older flags. Once a caller has used the new interface, torch's getters of the older flags may raise, and using
them warns. So only the interface that torch recommends is used here, whichever the caller has used.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_lock = threading.Lock()
_users = 0  # verifications that need the settings as they are now; the last one restores them
_changed: "list[tuple[_Setting, Any]]" = []  # with the caller's values


@dataclass(frozen=True)
class _Setting:
    """A setting of torch. ``is_for`` is the type of the devices that it affects directly; "" if others inherit it."""

    is_for: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    exact: Any


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute float32 products and convolutions on ``device`` without rounding their inputs.

    The settings belong to the process: other threads see a change, and in them, the getter
    ``torch.backends.cudnn.allow_tf32`` may raise meanwhile. So they are changed only if necessary, which is rare on a
    CPU. The caller's settings are restored, including which of them are inherited. Threads may use this at the same
    time.
    """
    is_user = _begin(device)
    try:
        yield
    finally:
        if is_user:
            _end()


def _begin(device: torch.device) -> bool:
    global _users
    with _lock:
        settings = _settings()
        # If another thread has made the settings exact, count this one as well: otherwise, that thread restores them
        # while this one computes.
        if not _users and not any(s.is_for == device.type and s.read() not in ("none", s.exact) for s in settings):
            return False
        if not _users:
            for setting in settings:
                value = setting.read()
                if value != setting.exact:
                    _changed.append((setting, value))
                    setting.write(setting.exact)
        _users += 1
        return True


def _end() -> None:
    global _users
    with _lock:
        _users -= 1
        while not _users and _changed:
            setting, value = _changed.pop()
            setting.write(value)


def _settings() -> list[_Setting]:
    """The settings in order of inheritance.

    Reading a setting that is "none" returns the value that it inherits. So a setting that still differs after those
    before it were made exact has a value of its own, which can be restored.
    """
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        precision = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
        return [
            _Setting("cuda", *precision),
            _Setting("cpu", *precision),
            _attribute("cuda", backends.cudnn, "allow_tf32", False),
        ]
    mkldnn = backends.mkldnn
    return [
        _attribute("", backends),
        _attribute("", backends.cudnn),
        # Assigning to mkldnn.fp32_precision changes that of all backends.
        _Setting("", lambda: mkldnn.fp32_precision, lambda value: mkldnn.set_flags(_fp32_precision=value), "ieee"),
        _attribute("cuda", backends.cuda.matmul),
        _attribute("cuda", backends.cudnn.conv),
        _attribute("cpu", mkldnn.matmul),
        _attribute("cpu", mkldnn.conv),
    ]


def _attribute(is_for: str, owner: Any, name: str = "fp32_precision", exact: Any = "ieee") -> _Setting:
    return _Setting(is_for, lambda: getattr(owner, name), lambda value: setattr(owner, name, value), exact)
