"""Offloaded weights are computed with correctly and do not stay in memory."""

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from streamconv.verification import offload
from streamconv.verification.offload import ALIGNMENT, OffloadedModel, WeightBuffer
from streamconv.verification.page_cache import FileMappings
from tests.checkpoints import State
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


class Resident:
    """Weights in memory, as `Weights`, which record the names that are read."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.names: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        self.names.append(name)
        return self._state[name]

    def release(self, name: str) -> None:
        assert name == self.names[-1]


def offloaded(
    model: nn.Module, cast_to: torch.dtype | None = None, buffer: WeightBuffer | None = None
) -> OffloadedModel:
    return OffloadedModel(model, CPU, buffer or WeightBuffer(CPU), Resident(model.state_dict()), cast_to)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.scale = nn.Linear(width, width), nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Like xFormers' SwiGLU, it reads a child's weights and does not call the child.
        return functional.linear(x, self.inside.weight, self.inside.bias) * self.scale


class Deep(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.rand(width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.register_buffer("shift", torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.start
        for block in self.blocks:
            x = block(x)
        return x + self.shift


def test_buffer_that_the_model_computes_keeps_its_values_and_one_of_the_file_is_read() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("frequencies", torch.rand(8), persistent=False)
    model[0].register_buffer("mask", torch.rand(4, dtype=torch.bfloat16))
    state = model.state_dict()
    computed = model.frequencies.clone()
    model[0].mask = torch.empty(4, device="meta")  # as in a model whose weights are read on demand
    lazy = OffloadedModel(model, CPU, WeightBuffer(CPU), Resident(state))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        lazy.compute_in(dtype)
        assert torch.equal(model.frequencies, computed)
        assert torch.equal(model[0].mask, state["0.mask"].to(dtype))


@pytest.mark.parametrize("limit", [80 << 20, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_offloaded_model_computes_the_same_and_holds_no_weights(
    limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(offload.MODULE_BYTES, "cpu", limit)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Sequential(nn.Linear(96, 32)))
    x = torch.randn(5, 64, dtype=dtype)
    lazy = offloaded(copy.deepcopy(model))
    with torch.no_grad():
        lazy.compute_in(torch.float32)
        lazy.compute_in(dtype)
        assert torch.equal(lazy.model(x), model.to(dtype)(x))
    assert {parameter.device.type for parameter in lazy.model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in lazy.model.parameters()} == {dtype}


def test_modules_that_read_the_weights_of_their_children_are_loaded_as_a_whole() -> None:
    model, x = Deep(24, 3), torch.randn(2, 24)
    lazy = offloaded(copy.deepcopy(model))
    lazy.compute_in(torch.float32)
    with torch.no_grad():
        assert torch.equal(lazy.model(x), model(x))


def test_buffer_does_not_grow_with_the_number_of_layers() -> None:
    sizes = []
    for depth in (2, 40):
        lazy = offloaded(Deep(24, depth))
        lazy.compute_in(torch.float32)
        with torch.no_grad(), patch.object(torch, "empty", side_effect=AssertionError("a layer allocated memory")):
            lazy.model(torch.ones(2, 24))
        assert lazy.buffer.used == 0
        sizes.append(len(lazy.buffer._bytes))
    assert sizes[0] == sizes[1] >= 4 * (24 * 24 + 2 * 24)


def test_buffer_returns_aligned_tensors_that_never_overlap() -> None:
    buffer = WeightBuffer(CPU)
    buffer.reserve(1000)
    tensors = [buffer.push(torch.Size([n]), torch.float32) for n in (3, 100, 20, 40, 100)]
    assert [tensor.data_ptr() % ALIGNMENT for tensor in tensors] == [0] * 5
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in tensors] == [[value] for value in range(5)]


def test_weights_are_cast_before_they_are_converted() -> None:
    model, x = Deep(24, 2), torch.randn(2, 24)
    lazy = offloaded(copy.deepcopy(model), torch.bfloat16)
    lazy.compute_in(torch.float32)
    with torch.no_grad():
        cast = lazy.model(x)
        lazy.cast_to(None)
        assert torch.equal(lazy.model(x), model(x))
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
        assert torch.equal(cast, model(x))


def test_a_layer_that_runs_again_is_not_loaded_again_unless_the_buffer_was_used() -> None:
    model, x, buffer = Deep(24, 2), torch.randn(2, 24), WeightBuffer(CPU)
    lazy, other = (offloaded(copy.deepcopy(model), buffer=buffer) for _ in range(2))
    weights: Any = lazy._weights
    lazy.compute_in(torch.float32)
    other.compute_in(torch.float32)
    weights.names.clear()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(lazy.model.blocks[1](x), model.blocks[1](x))
        assert weights.names == ["blocks.1.scale", "blocks.1.inside.weight", "blocks.1.inside.bias"]
        other.model.blocks[0](x)
        assert torch.equal(lazy.model.blocks[1](x), model.blocks[1](x))
        assert len(weights.names) == 6
        lazy.cast_to(torch.bfloat16)
        assert not torch.equal(lazy.model.blocks[1](x), model.blocks[1](x))
        lazy.cast_to(None)
        lazy.compute_in(torch.float64)
        assert torch.equal(lazy.model.blocks[1](x.double()), model.double().blocks[1](x.double()))


@pytest.mark.parametrize("limit", [80 << 20, 0])
def test_kept_weights_of_a_module_are_not_overwritten_by_those_inside_it(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(offload.MODULE_BYTES, "cpu", limit)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layers = nn.Parameter(torch.rand(24)), nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.layers(self.scale * x)

    model, x = nn.Sequential(Outer()), torch.randn(2, 24)
    lazy = offloaded(copy.deepcopy(model))
    lazy.compute_in(torch.float32)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(lazy.model(x), model(x))
