"""TF32 is off while models are compared, however the caller has allowed it. Then the settings are restored."""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from streamconv.verification.precision import exact_float32

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HAS_PRECISIONS = hasattr(torch.backends, "fp32_precision")  # since torch 2.9

OLD_FLAGS = [
    "pass",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
]
PRECISIONS = [
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'bf16'",
    "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.set_flags(_fp32_precision='bf16')",
    "torch.backends.cudnn.conv.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    # The older getters raise after each of these.
    "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.backends.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('medium'); torch.backends.fp32_precision = 'ieee'",
]
# Each setting is made in processes of its own, forked from one that has imported torch.
COMPARE = """
import os, sys
from tests.models.test_precision import describe
for setting in sys.argv[1:]:
    for is_used in (False, True):
        if not os.fork():
            print(describe(setting, is_used), flush=True)
            os._exit(0)
        os.wait()
"""


def precisions() -> dict[tuple[str, str], str]:
    """torch's settings by backend and operation; "none" for one that is inherited."""
    operations = {"generic": ["all"], "cuda": ["all", "matmul", "conv"], "mkldnn": ["all", "matmul", "conv"]}
    pairs = [(backend, operation) for backend, names in operations.items() for operation in names]
    return {pair: torch._C._get_fp32_precision_getter(*pair) for pair in pairs}


def older_flags() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def is_exact(device: torch.device) -> bool:
    if not HAS_PRECISIONS:
        precision, allows_tf32 = older_flags()
        return precision == "highest" and not (allows_tf32 and device == CUDA)
    backend = "cuda" if device == CUDA else "mkldnn"
    return {precisions()[backend, operation] for operation in ("matmul", "conv")} <= {"ieee", "none"}


def describe(setting: str, is_used: bool) -> list[Any]:
    """Make a setting in this process, perhaps compute exactly, and return torch's settings.

    They are returned again after each change of a setting that others inherit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its older flags
        exec(setting)
    for device in (CUDA, CPU) if is_used else ():
        with warnings.catch_warnings(), exact_float32(device):
            warnings.simplefilter("error")
            assert is_exact(device)
    if not HAS_PRECISIONS:
        return [older_flags()]
    seen = [precisions()]
    for backend in ("cuda", "mkldnn", "generic"):
        torch._C._set_fp32_precision_setter(backend, "all", "ieee" if backend == "generic" else "none")
        seen.append(precisions())
    return seen


def test_callers_settings_are_made_exact_and_restored_with_what_they_inherit() -> None:
    made = OLD_FLAGS + (PRECISIONS if HAS_PRECISIONS else [])
    done = subprocess.run([sys.executable, "-c", COMPARE, *made], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(made), done.stderr
    for i, setting in enumerate(made):
        assert lines[2 * i] == lines[2 * i + 1], setting


def test_last_of_two_threads_restores_the_settings() -> None:
    before = precisions() if HAS_PRECISIONS else older_flags()
    first, second = exact_float32(CUDA), exact_float32(CUDA)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        one.submit(first.__exit__, None, None, None).result()
        assert is_exact(CUDA)
        other.submit(second.__exit__, None, None, None).result()
    assert (precisions() if HAS_PRECISIONS else older_flags()) == before


def test_verification_on_a_cpu_keeps_what_one_on_a_gpu_has_made_exact() -> None:
    gpu, cpu = exact_float32(CUDA), exact_float32(CPU)
    with cpu:
        assert not is_exact(CUDA)  # nothing had to be changed
        older_flags()  # which does not raise
    gpu.__enter__()
    with exact_float32(CPU):
        gpu.__exit__(None, None, None)
        assert is_exact(CUDA)
    assert not is_exact(CUDA)
