"""Verification on a GPU: placement, memory, errors of the GPU, and wrong outputs.

Most tests use a fake GPU. Those marked `gpu` need a real one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from streamconv import UsageError, Verification
from streamconv.families.dinov2_geometry import Dimensions
from streamconv.verification import devices
from streamconv.verification.offload import OffloadedModel, WeightBuffer
from streamconv.verification.originals import dinov2
from streamconv.verification.weights import MappedWeights
from tests import api
from tests.checkpoints import State, alter, make_states, saved
from tests.fake_cuda import CudaError, FakeCuda, no_memory_for_cublas, two_gpus
from tests.models.test_precision import is_exact
from tests.support import ARCHITECTURES, run, run_process, tiny, verdicts

pytestmark = pytest.mark.transformers

GPU = torch.device("cuda", 0)
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))
ON_BOTH = pytest.mark.parametrize("is_real", [False, pytest.param(True, marks=NEEDS_GPU)], ids=["fake", "real"])
SMALL = 200 << 10  # bytes: other than weights, what is moved is the image and the numbers of a small computation


class Converted:
    """A converted folder."""

    def __init__(self, folder: Path, dimensions: Dimensions, **options: Any):
        backbone, head = make_states(dimensions)
        self.folder, self.source = folder / "out", saved(backbone, folder / "source.pth")
        self.head = saved(head, folder / "head.pth") if head else None
        self.nbytes = sum(value.nbytes for value in [*backbone.values(), *head.values()])
        api.convert(self.source, self.folder, head=self.head, **options)

    def verify_on(self, device: str, is_real: bool = True) -> Verification:
        return self._verify(device) if is_real else self.verify(device)[0]

    def _verify(self, device: str) -> Verification:
        return api.verify(self.folder, self.source, head=self.head, device=device)

    def verify(self, device: str = "cuda", **options: Any) -> tuple[Verification, FakeCuda]:
        """Verify it on a fake GPU with these options."""
        with FakeCuda(**options) as gpu, mock.patch.object(devices, "_has_gpu", return_value=True):
            return self._verify(device), gpu


@pytest.fixture
def converted(tmp_path: Path) -> Converted:
    return Converted(tmp_path, tiny(swiglu=True))  # in which float32 is rounded differently, so float64 decides


@ON_BOTH
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_correct_conversion_passes_in_float64(tmp_path: Path, architecture: str, is_real: bool) -> None:
    found = Converted(tmp_path, ARCHITECTURES[architecture]).verify_on("cuda", is_real)
    assert found.passed, found.checks
    numbers = found.check("parity").numbers
    assert numbers["tolerance"] == (1e-13 if "float32" in numbers else 0)
    assert found.device == "cuda:0"
    assert found.gpu["name"]
    assert found.memory["gpu_peak"] is not None
    assert found.memory["gpu_used_peak"] is not None
    assert 0 < found.memory["gpu_peak"] < found.memory["gpu_used_peak"]


@two_gpus
def test_models_run_on_the_gpu_that_was_named(tmp_path: Path) -> None:
    found, gpu = Converted(tmp_path, tiny(swiglu=True, classes=5, registers=4)).verify("cuda:1", count=2)
    assert found.passed
    assert found.device == "cuda:1"
    assert gpu.used == {"cuda:1"}
    assert gpu.caches_emptied == 0
    assert found.memory["gpu_peak"] == gpu.peak


def test_peak_does_not_grow_with_depth(tmp_path: Path) -> None:
    peaks = []
    for layers in (4, 12):
        folder = tmp_path / str(layers)
        folder.mkdir()
        converted = Converted(folder, tiny(layers=layers))
        found, gpu = converted.verify()
        assert found.passed
        peaks.append(gpu.peak)
    assert peaks[1] < 1.01 * peaks[0]


def test_weights_are_moved_in_the_dtype_that_they_are_stored_in(tmp_path: Path) -> None:
    backbone, _ = make_states(tiny())
    source = saved({name: value.bfloat16() for name, value in backbone.items()}, tmp_path / "source.pth")
    api.convert(source, tmp_path / "out")
    with FakeCuda() as gpu:
        assert api.verify(tmp_path / "out", source, device="cuda").passed
    assert gpu.moved[torch.bfloat16] > 2 * 0.9 * sum(value.nbytes // 2 for value in backbone.values())
    pixels = 3 * 224 * 224 * 4
    assert gpu.moved[torch.float32] < pixels + SMALL
    assert gpu.moved[torch.float64] < 2 * pixels + SMALL


def test_cast_weights_are_moved_in_the_small_dtype_and_converted_on_the_gpu() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weights = MappedWeights(model.state_dict())
    x = torch.randn(1, 8)
    with FakeCuda() as gpu, torch.no_grad():
        offloaded = OffloadedModel(model, GPU, WeightBuffer(GPU), weights, cast_to=torch.bfloat16)
        offloaded.compute_in(torch.float64)
        found = offloaded.model(x.to(GPU).double())
        assert found.dtype == torch.float64
    assert gpu.moved == {torch.bfloat16: 2 * 2 * (64 + 8), torch.float32: x.nbytes}


def float16(state: State) -> None:
    for value in state.values():
        value.copy_(value.half())


def one_bfloat16(state: State) -> None:
    value = state["encoder.layer.1.attention.output.dense.weight"]
    value.copy_(value.bfloat16())


def layer_scale(state: State) -> None:
    state["encoder.layer.1.layer_scale1.lambda1"][3] *= 1.01


def query_and_key(state: State) -> None:
    names = [f"encoder.layer.1.attention.attention.{name}.weight" for name in ("query", "key")]
    state[names[0]], state[names[1]] = state[names[1]], state[names[0]]


@ON_BOTH
@pytest.mark.parametrize("change", [float16, one_bfloat16, layer_scale, query_and_key])
def test_wrong_output_fails_although_the_difference_is_small(
    tmp_path: Path, change: Callable[[State], None], is_real: bool
) -> None:
    converted = Converted(tmp_path, tiny(hidden=64))
    alter(converted.folder, change)
    found = converted.verify_on("cuda", is_real)
    check = found.check("parity")
    assert check.passed is False
    assert check.numbers["tolerance"] == 1e-13
    assert "the first difference is in " in check.problems[0]


def test_too_little_memory_for_float64_is_in_the_verdict(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    real = dinov2.VisionTransformer.prepare_tokens_with_masks

    def rounded(self: dinov2.VisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
        return real(self, pixels) * (1 + 1e-6 * (pixels.dtype == torch.float32))

    monkeypatch.setattr(dinov2.VisionTransformer, "prepare_tokens_with_masks", rounded)
    whole, gpu = converted.verify()
    assert "float32" in whole.check("parity").numbers
    found, _ = converted.verify(memory=gpu.peak * 9 // 10)
    check = found.check("parity")
    assert found.device == "cuda:0"
    assert check.passed
    assert check.numbers["float32_only"] == "cuda:0 has too little memory for float64"
    assert "errors below 0.001 of a layer's largest value cannot be excluded" in check.not_checked


def failing_from(first: int, error: Exception, times: int | None = None) -> Callable[[str], None]:
    """Let the operation number ``first`` fail, and ``times`` in all, or all that follow."""
    numbers = iter(range(1, 1_000_000))

    def fail(operation: str) -> None:
        number = next(numbers)
        if number >= first and (times is None or number < first + times):
            raise error

    return fail


FAILURES: dict[str, Callable[[], dict[str, Any]]] = {
    "too little memory": lambda: {"memory": 1 << 20},
    "an error of CUDA": lambda: {"fail": failing_from(300, CudaError("CUDA error: uncorrectable ECC error"), times=1)},
    "a lost context": lambda: {"fail": failing_from(300, RuntimeError("CUDA error: unspecified launch failure"))},
    "an error of cuBLAS": lambda: {"fail": failing_from(300, RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), times=1)},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_gpu_that_fails_meanwhile_never_condemns_an_output(converted: Converted, failure: str) -> None:
    with pytest.raises(UsageError, match=r"cuda:0 cannot be used: .*, or use --device cpu"):
        converted.verify("cuda", **FAILURES[failure]())
    found, _ = converted.verify("auto", **FAILURES[failure]())
    assert found.passed
    assert found.device == "cpu"
    assert found.gpu == {}
    assert found.memory["gpu_peak"] is None
    assert found.device_note.startswith("verified on the CPU, because the GPU cannot be used: ")


def test_library_that_lacks_memory_while_models_run_is_not_a_broken_gpu(converted: Converted) -> None:
    with pytest.raises(UsageError, match=r"too little free memory \(.*CUBLAS_STATUS_ALLOC_FAILED.*\). Free the GPU's"):
        converted.verify("cuda", fail=failing_from(300, no_memory_for_cublas(), times=1))


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_models_that_fail_on_a_cpu_too_are_wrong(converted: Converted, device: str) -> None:
    with mock.patch.object(dinov2.VisionTransformer, "prepare_tokens_with_masks", side_effect=ValueError("wrong")):
        found, _ = converted.verify(device)
    assert verdicts(found)["parity"] is False
    assert found.check("parity").problems == ("ValueError: wrong",)
    assert found.device == "cpu"
    assert found.device_note == ""


def test_tf32_is_off_while_models_run_although_the_caller_allows_it(converted: Converted) -> None:
    seen = set()

    def look(operation: str) -> None:
        if operation == "aten.native_layer_norm":
            seen.add(is_exact(GPU))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert not is_exact(GPU)
        found, _ = converted.verify(fail=look)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.passed
    assert seen == {True}


def test_command_prints_why_it_used_the_cpu(converted: Converted, tmp_path: Path) -> None:
    with FakeCuda(memory=1 << 20), mock.patch.object(devices, "_has_gpu", return_value=True):
        done = run("verify", converted.folder, converted.source, cwd=tmp_path)
    assert done.returncode == 0
    note = " ".join(done.stderr.partition("note: ")[2].split())
    assert note.startswith("verified on the CPU, because the GPU cannot be used: it has too little free memory (CUDA")


def test_broken_gpu_that_was_named_is_refused_before_the_conversion(converted: Converted, tmp_path: Path) -> None:
    with FakeCuda(fail=failing_from(1, CudaError("no kernel image"))):
        done = run("run", converted.source, "-o", tmp_path / "new", "--device", "cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert "cuda cannot be used: " in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_callers_tf32_does_not_change_the_result(tmp_path: Path) -> None:
    converted = Converted(tmp_path, tiny(swiglu=True, classes=5))
    before = torch.get_float32_matmul_precision()
    exact = converted.verify_on("cuda")
    torch.set_float32_matmul_precision("high")
    try:
        found = converted.verify_on("cuda")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    # Both models round alike with TF32, too, so the differences between them could not show it.
    assert found.predictions == exact.predictions != ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_index_chooses_a_gpu_in_a_process_that_has_not_started_cuda(converted: Converted, tmp_path: Path) -> None:
    words = ("verify", converted.folder, converted.source, "--device")
    assert run_process(*words, "cuda:0", cwd=tmp_path).returncode == 0
    missing = run_process(*words, "cuda:99", cwd=tmp_path)
    assert (missing.returncode, "numbered from cuda:0" in missing.stderr) == (2, True)
    hidden = run_process(*words, "cuda", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (hidden.returncode, "Unset CUDA_VISIBLE_DEVICES" in hidden.stderr) == (2, True)
