"""The source tensors of a model that was loaded from a sparse folder."""

from pathlib import Path

import torch

from streamconv.formats.checkpoint import open_checkpoint
from streamconv.tensors.evaluation import read_bytes
from streamconv.verification.sparse_folder import _part


def test_slice_of_a_tensor_is_found_by_its_place_in_the_output(tmp_path: Path) -> None:
    state = {"plain": torch.arange(24.0).reshape(6, 4), "strided": torch.arange(24.0).reshape(4, 6).t()}
    torch.save(state, tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        plain, strided = checkpoint["plain"], checkpoint["strided"]
        part = _part(plain, 2 * 4 * 4, (3, 4))
        assert part is not None
        assert read_bytes(part) == state["plain"][2:5].numpy().tobytes()
        assert _part(plain, 0, (6, 4)) == plain
        assert _part(plain, 2 * 4 * 4, (5, 4)) is None  # beyond its end
        assert _part(strided, 0, (6, 4)) == strided
        part = _part(strided, 4 * 4, (2, 4))
        assert part is not None
        assert read_bytes(part) == state["strided"][1:3].contiguous().numpy().tobytes()
