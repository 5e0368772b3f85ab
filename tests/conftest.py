"""What several tests need: small checkpoints, made by torch."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from streamconv.families.base import HEAD_PREFIX
from streamconv.families.dinov2 import FAMILY, Geometry, ffn_size
from streamconv.files import remote
from tests.file_server import FileServer, serving

State = dict[str, torch.Tensor]


def tiny(
    swiglu: bool = False, classes: int | None = None, layers: int = 3, hidden: int = 128, registers: int = 0
) -> Geometry:
    """A model that runs in milliseconds: a 4 x 4 grid of patches, two heads."""
    ffn = ffn_size(hidden, 4, swiglu)
    return Geometry(hidden, layers, ffn, swiglu, positions=17, registers=registers, classes=classes)


def make_states(geometry: Geometry, seed: int = 0) -> tuple[State, State]:
    """Random backbone and head (empty without classes) in the original layout."""
    generator = torch.Generator().manual_seed(seed)
    backbone, head = {}, {}
    for name, info in FAMILY.sources(geometry).items():
        value = torch.randn(info.shape, generator=generator) * (0.1 if len(info.shape) == 1 else info.shape[-1] ** -0.5)
        if name.startswith(HEAD_PREFIX):
            head[name.removeprefix(HEAD_PREFIX)] = value
        else:
            backbone[name] = value
    return backbone, head


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., tuple[Path, Path | None]]:
    """Save a geometry's random checkpoint by torch.save; gives the files' paths."""

    def make(geometry: Geometry, name: str = "source") -> tuple[Path, Path | None]:
        backbone, head = make_states(geometry)
        torch.save(backbone, tmp_path / f"{name}.pth")
        if head:
            torch.save(head, tmp_path / f"{name}_head.pth")
        return tmp_path / f"{name}.pth", tmp_path / f"{name}_head.pth" if head else None

    return make


@pytest.fixture
def read_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each reading of a file at an offset gives from now on."""
    counts: list[int] = []
    real = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(real(fd, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return counts


def seeds_mapping(state: State, prefix: str = "") -> State:
    """The original script's mapping, written down once more: what streamconv's rules are measured against."""
    result: State = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            layer, part = key.split(".")[1], key.split(".")[-1]
            size = value.shape[0] // 3
            for i, name in enumerate(("query", "key", "value")):
                rows = value[i * size : (i + 1) * size]
                result[f"{prefix}encoder.layer.{layer}.attention.attention.{name}.{part}"] = rows.contiguous()
            continue
        new = key.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.output.dense")
        new = new.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")
        new = new.replace("w12", "weights_in").replace("w3", "weights_out")
        if new.startswith("patch_embed."):
            new = new.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        elif new in ("cls_token", "mask_token", "register_tokens"):
            new = f"embeddings.{new}"
        elif new == "pos_embed":
            new = "embeddings.position_embeddings"
        elif new.startswith("norm."):
            new = f"layernorm.{new.removeprefix('norm.')}"
        result[prefix + new] = value
    return result


def run_python(code: str) -> str:
    """The output of a Python process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A file server on the loopback, no long waits for it, and a cache of torch.hub's of the test's own."""
    monkeypatch.setattr(remote, "WAITS_SECONDS", (0, 0.01, 0.01, 0.01, 0.01, 0.01))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("HF_ENDPOINT", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as running:
        yield running
