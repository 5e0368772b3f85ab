"""Small files whose names are many, long or deep are refused by commands in little time and memory."""

import json
import struct
from pathlib import Path

import pytest
import torch

from streamconv.tensors.info import TensorInfo
from tests.hostile import Refusal
from tests.unit.test_linear import AROUND, BACKBONE, FEW_KEYS, NORM, Shapes

BLOCKS = {f"blocks.{2 * i}.norm1.weight": NORM for i in range(10_000)}
LISTS = {f"blocks.{i}.{i}.norm1.weight": NORM for i in range(10_000)}
COPIES = {f"p{i}.{key}": BACKBONE[key] for i in range(6_000) for key in FEW_KEYS}


def write_safetensors(path: Path, shapes: Shapes) -> None:
    """Write a sparse file."""
    header: dict[str, object] = {}
    at = 0
    for name, shape in shapes.items():
        size = TensorInfo("F32", shape).nbytes
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    data = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + at)


HOSTILE: dict[str, tuple[Shapes, str]] = {
    "every second block": ({**BACKBONE, **BLOCKS}, "does not fit"),
    "lists of blocks, the last one wrong": (
        {**AROUND, **LISTS, "blocks.7.10000.norm1.weight": NORM}, "lists of unequal lengths"),
    "backbones": (COPIES, "several backbones"),
    "names of zeros": ({**BACKBONE, **{"0." * 450 + str(i): (2, 2) for i in range(2_000)}}, "more than a backbone"),
    "no backbone": ({"a." * 450 + str(i): (2, 2) for i in range(2_000)}, "not a checkpoint of a model"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("command", ["plan", "convert"])
def test_hostile_names_are_refused(name: str, command: str, tmp_path: Path, refusal: Refusal) -> None:
    shapes, message = HOSTILE[name]
    write_safetensors(tmp_path / "x.safetensors", shapes)
    text = refusal(tmp_path / "x.safetensors", command=command)
    assert message in text, text


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_names_under_a_prefix_of_dots_are_refused(command: str, tmp_path: Path, refusal: Refusal) -> None:
    zero = torch.zeros(1)
    state = {key: zero.expand(shape) for key, shape in BACKBONE.items()}
    torch.save({"." * 480 + key: each for key, each in state.items()} | {
        "." * 480 + f"x{i}": zero for i in range(5_000)}, tmp_path / "x.pth")  # fmt: skip
    assert "more than a backbone" in refusal(tmp_path / "x.pth", command=command)
