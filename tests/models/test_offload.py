"""Offloaded weights are computed with correctly and do not stay in memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from streamconv.verification.offload import (
    OffloadedModel,
    OffloadedWeights,
    convolve_in_float64,
    exact_layers,
)
from streamconv.verification.page_cache import FileMappings
from tests.support import linux

CPU = torch.device("cpu")


def resident_file_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssFile:")[1].split()[0]) << 10


@linux
def test_released_tensor_leaves_memory_and_is_read_back_equal(tmp_path: Path) -> None:
    value = torch.randn(8 << 20)  # 32 MB
    safetensors.torch.save_file({"x": value}, tmp_path / "x.safetensors")
    mapped = safetensors.torch.load_file(tmp_path / "x.safetensors")["x"]
    assert torch.equal(mapped, value)
    before = resident_file_bytes()
    FileMappings().release(mapped)
    assert before - resident_file_bytes() > 30 << 20
    assert torch.equal(mapped, value)


def test_memory_without_a_file_is_never_released() -> None:
    mappings = FileMappings()
    value = torch.randn(8 << 20)
    later = torch.randn(1 << 20)
    copies = value.clone(), later.clone()
    for tensor in (value, later, value[5:], value[::2], value[:0]):
        mappings.release(tensor)
    assert torch.equal(value, copies[0])
    assert torch.equal(later, copies[1])


def test_offloaded_weights_have_the_requested_dtype(tmp_path: Path) -> None:
    state = {"a": torch.randn(300, 300).bfloat16(), "b": torch.randn(7)}
    weights = OffloadedWeights(state, CPU, torch.float64)
    assert list(weights) == ["a", "b"]
    assert len(weights) == 2
    for name, value in state.items():
        assert weights[name].dtype == torch.float64
        assert torch.equal(weights[name], value.double())


def test_offloaded_model_computes_the_same_and_holds_no_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 32))
    x = torch.randn(5, 64)
    with torch.no_grad():
        single, double = model(x), model.double()(x.double())
        offloaded = OffloadedModel(model.float(), CPU)
        assert torch.allclose(offloaded.model(x), single, atol=1e-6)
        offloaded.compute_in(torch.float64)
        assert torch.allclose(offloaded.model(x.double()), double, atol=1e-12)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("bias", [True, False])
def test_fast_linear_layer_equals_a_linear_layer(bias: bool) -> None:
    layer, x = nn.Linear(129, 77, bias=bias), torch.randn(3, 50, 129)
    with torch.no_grad(), exact_layers():
        fast = layer(x)
        assert functional.linear(x, weight=layer.weight).shape == (3, 50, 77)  # called otherwise: torch's own
        assert torch.equal(layer.double()(x.double()), functional.linear(x.double(), layer.weight, layer.bias))
    assert torch.allclose(
        fast, functional.linear(x, layer.weight.float(), layer.bias.float() if bias else None), atol=1e-5
    )


@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_in_float64_is_rounded_once(with_bias: bool) -> None:
    layer, x = nn.Conv2d(3, 8, 5, stride=5, bias=with_bias), torch.randn(2, 3, 20, 20)
    found = convolve_in_float64(x, layer.weight, layer.bias, layer.stride)
    assert torch.equal(found, layer.double()(x.double()).float())


def test_matrix_products_that_may_use_tf32_are_found() -> None:
    """In separate processes, because torch refuses to mix its two interfaces."""
    code = (
        "import torch; from streamconv.verification.offload import allows_tf32; gpu = torch.device('cuda')\n"
        "print(allows_tf32(gpu)); {}; print(allows_tf32(gpu), allows_tf32(torch.device('cpu')))"
    )
    settings = ["torch.backends.cuda.matmul.allow_tf32 = True", "torch.set_float32_matmul_precision('medium')"]
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        settings.append("torch.backends.cuda.matmul.fp32_precision = 'tf32'")
    for setting in settings:
        done = subprocess.run([sys.executable, "-c", code.format(setting)], capture_output=True, text=True)
        assert done.stdout == "False\nTrue False\n", done.stderr
