"""The fake GPU computes correctly, and notices what a real one would refuse, or what would waste its memory."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.fake_cuda import CudaTensor, FakeCuda

CUDA = torch.device("cuda", 0)


def test_numbers_are_those_of_the_cpu_and_views_share_memory() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    with FakeCuda() as gpu, torch.no_grad():
        found = functional.gelu(functional.linear(x.to(CUDA), layer.weight.to(CUDA), layer.bias.to(CUDA)))
        assert isinstance(found, CudaTensor)
        assert found.device == CUDA
        assert torch.equal(found.cpu(), functional.gelu(layer(x)))
        buffer = torch.empty(96, dtype=torch.uint8, device=CUDA)
        view = buffer[:72].view(torch.float32).view(3, 6)
        view.copy_(x)
        view.mul_(2)
        assert torch.equal(buffer[:72].cpu().view(torch.float32), 2 * x.flatten())
    assert gpu.moved == {torch.float32: 2 * x.nbytes + layer.weight.nbytes + layer.bias.nbytes}
    assert gpu.read_back == 2


def test_attention_equals_that_of_the_cpu() -> None:
    query, key, value = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    with FakeCuda():
        found = functional.scaled_dot_product_attention(query.to(CUDA), key.to(CUDA), value.to(CUDA)).cpu()
    assert torch.allclose(found, functional.scaled_dot_product_attention(query, key, value), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x.to(CUDA) + x,
        lambda x: x @ x.to(CUDA),
        lambda x: torch.cat((x.to(CUDA), x)),
        lambda x: x.to(CUDA).add_(x),
        lambda x: functional.linear(x.to(CUDA), x),
        lambda x: functional.layer_norm(x.to(CUDA), (4,), x[0]),
        lambda x: x.to(CUDA) + x.to("cuda:1"),
        lambda x: x.to(CUDA) + x.to("meta"),
    ],
)
def test_tensors_of_two_devices_do_not_meet(mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with FakeCuda(count=2), pytest.raises(RuntimeError, match="to be on the same device"):
        mix(torch.ones(4, 4))


def test_numbers_without_dimensions_may_come_from_the_cpu() -> None:
    with FakeCuda():
        assert (torch.ones(2, device=CUDA) * torch.tensor(3.0)).cpu().tolist() == [3, 3]


def test_wrong_use_of_cuda_is_refused() -> None:
    with FakeCuda() as gpu:
        with pytest.raises(RuntimeError, match="did you call init"):
            torch.cuda.max_memory_allocated(CUDA)
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.ones(2, device="cuda:1")
        with pytest.raises((RuntimeError, TypeError)):
            torch.ones(2, device=CUDA).numpy()
        torch.cuda.empty_cache()
    assert gpu.caches_emptied == 1


class Leaking(nn.Module):
    """Moves each layer's weights to the GPU when it runs, and may keep them there."""

    def __init__(self, depth: int, keeps: bool):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))
        self.kept: list[torch.Tensor] = []
        self.keeps = keeps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            weight = layer.weight.to(x.device)  # type: ignore[union-attr]
            x = functional.linear(x, weight)
            self.kept += [weight] if self.keeps else []
        return x


@pytest.mark.parametrize("keeps", [False, True])
def test_peak_grows_with_depth_only_if_weights_are_kept(keeps: bool) -> None:
    peaks = []
    for depth in (4, 12):
        with FakeCuda() as gpu, torch.no_grad():
            Leaking(depth, keeps)(torch.ones(1, 32, device=CUDA))
        peaks.append(gpu.peak)
    assert (peaks[1] > peaks[0]) == keeps
    assert (peaks[1] - peaks[0] == 8 * 32 * 32 * 4) == keeps


def test_freed_memory_can_be_used_again_and_more_than_there_is_fails() -> None:
    with FakeCuda(memory=1000) as gpu:
        for _ in range(5):
            torch.ones(200, device=CUDA)
        assert gpu.allocated == 0
        kept = torch.ones(200, device=CUDA)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.ones(200, device=CUDA)
        assert gpu.allocated == kept.nbytes == gpu.peak


def test_chosen_operations_fail() -> None:
    def fail(operation: str) -> None:
        if operation == "aten.mm":
            raise RuntimeError("no kernel")

    with FakeCuda(fail=fail):
        x = torch.ones(2, 2, device=CUDA) * 2
        with pytest.raises(RuntimeError, match="no kernel"):
            x @ x
