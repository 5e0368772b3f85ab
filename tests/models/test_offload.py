"""Weights stay in their files: what a verification holds in memory does not grow with the model."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from streamconv.verification.offload import OffloadedModel, OffloadedWeights, fast_linear_layers
from streamconv.verification.page_cache import FileMappings
from tests.conftest import run_python

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is told how memory is used")


def resident_file_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssFile:")[1].split()[0]) << 10


@linux
def test_a_released_tensor_leaves_the_process_and_comes_back_equal(tmp_path: Path) -> None:
    value = torch.randn(8 << 20)  # 32 MB
    safetensors.torch.save_file({"x": value}, tmp_path / "x.safetensors")
    mapped = safetensors.torch.load_file(tmp_path / "x.safetensors")["x"]
    assert torch.equal(mapped, value)
    before = resident_file_bytes()
    FileMappings().release(mapped)
    assert before - resident_file_bytes() > 30 << 20
    assert torch.equal(mapped, value)


def test_memory_that_no_file_holds_is_never_released() -> None:
    mappings = FileMappings()
    value = torch.randn(8 << 20)
    later = torch.randn(1 << 20)
    copies = value.clone(), later.clone()
    for tensor in (value, later, value[5:], value[::2], value[:0]):
        mappings.release(tensor)
    assert torch.equal(value, copies[0])
    assert torch.equal(later, copies[1])


def test_weights_come_in_the_asked_dtype_and_place(tmp_path: Path) -> None:
    state = {"a": torch.randn(300, 300).bfloat16(), "b": torch.randn(7)}
    weights = OffloadedWeights(state, CPU, torch.float64)
    assert list(weights) == ["a", "b"]
    assert len(weights) == 2
    for name, value in state.items():
        assert weights[name].dtype == torch.float64
        assert torch.equal(weights[name], value.double())


def test_an_offloaded_model_computes_the_same_and_holds_no_weights() -> None:
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
def test_the_fast_linear_layer_is_a_linear_layer(bias: bool) -> None:
    layer, x = nn.Linear(129, 77, bias=bias), torch.randn(3, 50, 129)
    with torch.no_grad(), fast_linear_layers():
        fast = layer(x)
        assert functional.linear(x, weight=layer.weight).shape == (3, 50, 77)  # called otherwise: torch's own
        assert torch.equal(layer.double()(x.double()), functional.linear(x.double(), layer.weight, layer.bias))
    assert torch.allclose(
        fast, functional.linear(x, layer.weight.float(), layer.bias.float() if bias else None), atol=1e-5
    )


@linux
def test_the_memory_of_a_verification_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Anonymous and resident memory of a process of its own, for 29 MB and 285 MB of weights."""
    code = f"""
import json, sys
from pathlib import Path
import streamconv, torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.conftest import make_states, tiny
layers, folder = int({{}}), Path({str(tmp_path)!r}, "{{}}")
folder.mkdir()
torch.save(make_states(tiny(layers=layers, hidden=768))[0], folder / "x.pth")
streamconv.convert(folder / "x.pth", folder / "out")
"""
    verify = """
import json, streamconv
found = streamconv.verify({!r}, {!r}, device="cpu")
assert found.passed
print(json.dumps(found.memory))
"""
    peaks = []
    for layers in (1, 10):
        run_python(code.format(layers, layers))
        folder = tmp_path / str(layers)
        peaks.append(json.loads(run_python(verify.format(str(folder / "out"), str(folder / "x.pth")))))
    anonymous = [peak["host_anonymous_peak"] - peak["host_anonymous_start"] for peak in peaks]
    assert abs(anonymous[1] - anonymous[0]) < 24 << 20, peaks
    # Resident memory may hold what was used last of both files (RECENT_BYTES each), and neither of them whole.
    resident = [peak["host_peak"] - peak["host_start"] for peak in peaks]
    assert resident[1] - resident[0] < 300 << 20, peaks
