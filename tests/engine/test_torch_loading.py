"""Files that torch cannot map, because they are larger than memory, are mapped at the places that torch finds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from streamconv.verification.page_cache import FileMappings
from streamconv.verification.torch_loading import NotLoadedError, load
from tests.support import linux


@linux
@pytest.mark.parametrize("pickle_protocol", [2, 4])
def test_file_that_torch_does_not_map_is_mapped_with_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickle_protocol: int
) -> None:
    base = torch.randn(6, 8)
    state = {
        "rows": base, "columns": base.t(), "slice": base[2:4, 1:5], "half": torch.randn(5).half(),
        "numbers": torch.arange(3), "parameter": torch.nn.Parameter(torch.randn(2)), "empty": torch.zeros(0, 3),
    }  # fmt: skip
    torch.save({"model": state, "epoch": 3}, tmp_path / "x.pth", pickle_protocol=pickle_protocol)
    monkeypatch.setattr(torch, "load", without_mapping(torch.load))
    loaded = load(tmp_path / "x.pth", is_legacy=False)
    assert loaded["epoch"] == 3
    assert loaded["model"].keys() == state.keys()
    assert all(torch.equal(loaded["model"][name], value) for name, value in state.items())
    assert loaded["model"]["columns"].stride() == (1, 8)
    assert FileMappings().location_of(loaded["model"]["rows"])[0] == tmp_path / "x.pth"  # type: ignore[index]


def test_release_of_torch_that_does_not_tell_the_places_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth")
    monkeypatch.setattr(torch, "load", without_mapping(lambda *words, **options: {"a": torch.ones(2, device="meta")}))
    with pytest.raises(NotLoadedError):
        load(tmp_path / "x.pth", is_legacy=False)


def without_mapping(original: Any) -> Any:
    """Return a torch.load that cannot map a file, as for a file that is larger than memory."""

    def loaded(*words: Any, mmap: bool = False, **options: Any) -> Any:
        if mmap:
            raise RuntimeError("unable to mmap")
        return original(*words, **options)

    return loaded
