"""Small tensors whose values decide about the conversion are read while it is planned."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamconv.families.aspects import DecidingValues
from streamconv.families.dinov2 import FAMILY
from streamconv.families.selection import Selection
from streamconv.formats.checkpoint import open_checkpoint
from streamconv.source import deciding_values
from streamconv.source.deciding_values import read_summaries, to_floats
from streamconv.tensors.info import BY_TORCH_NAME


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_are_those_of_torch(dtype: torch.dtype) -> None:
    values = torch.cat([torch.randn(50), torch.tensor([0.0, -0.0, float("inf"), 2.0**-20])]).to(dtype)
    data = values.view(torch.uint8).numpy().tobytes()
    assert list(to_floats(data, BY_TORCH_NAME[str(dtype).removeprefix("torch.")].code)) == values.double().tolist()


def summarise(key: str, values: Sequence[float]) -> float:
    return sum(values)


def test_selected_tensors_are_summarised_unless_they_are_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"{i}.mask": torch.full((4,), float(i)) for i in range(1, 9)}
    state |= {"wide.mask": torch.ones(100), "other": torch.ones(2), "int.mask": torch.ones(2, dtype=torch.int64)}
    torch.save(state, tmp_path / "x.pth")
    aspect = DecidingValues(lambda key: key.endswith("mask"), summarise, lambda dimensions, summaries: dimensions)
    selection = Selection(replace(FAMILY, deciding_values=aspect), "", {})
    monkeypatch.setattr(deciding_values, "MAX_TENSOR_BYTES", 399)
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        found = read_summaries(selection, checkpoint, checkpoint.reader)
        assert found == {f"{i}.mask": 4.0 * i for i in range(1, 9)}
        monkeypatch.setattr(deciding_values, "MAX_BYTES", 50)
        assert [*read_summaries(selection, checkpoint, checkpoint.reader)] == ["1.mask", "2.mask", "3.mask"]
        assert read_summaries(replace(selection, is_converted=True), checkpoint, checkpoint.reader) == {}
        assert read_summaries(replace(selection, family=FAMILY), checkpoint, checkpoint.reader) == {}
