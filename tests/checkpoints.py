"""Small checkpoints made with torch, and their contents as torch and safetensors read them."""

import argparse
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import streamconv
from streamconv.errors import SourceError
from streamconv.families.dinov2 import FAMILY
from streamconv.families.dinov2_geometry import Dimensions
from streamconv.tensors.evaluation import read_bytes
from streamconv.verification.originals import dinov2 as original
from tests import api
from tests.support import tiny

State = dict[str, torch.Tensor]
TORCH_DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16
}  # fmt: skip
HEAD = "linear_head."


def make_states(dimensions: Dimensions, seed: int = 0) -> tuple[State, State]:
    """Return a random backbone and head (empty without classes) in the original layout."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, info in FAMILY.sources(dimensions).items():
        scale = 0.1 if len(info.shape) == 1 else info.shape[-1] ** -0.5
        state[name] = torch.randn(info.shape, generator=generator) * scale
    return FAMILY.split_head(state)


def state_of(stored: str, factor: float = 1.0) -> State:
    return {name: (value * factor).to(TORCH_DTYPES[stored]) for name, value in make_states(tiny())[0].items()}


def mixed_state() -> State:
    """Return a state dict with tensors of float16 and of float32."""
    state = state_of("float16")
    return state | {name: value.float() for name, value in state.items() if "norm" in name or "qkv" in name}


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def chunked(state: State, size: int) -> State:
    """Rename blocks as Meta's vision_transformer.py names them in lists of ``size``."""
    result: State = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // size))
        result[".".join(parts)] = value
    return result


HEADS: State = {
    "dino_head.mlp.0.weight": torch.full((4, 128), 7.0),
    "dino_head.norm.bias": torch.full((128,), 7.0),
    "dino_head.last_layer.weight_g": torch.ones(4, 1),
    "ibot_head.norm.bias": torch.full((128,), 8.0),
    "ibot_head.norm.weight": torch.full((128,), 8.0),
}


def teacher(state: State) -> dict[str, Any]:
    """A checkpoint like Meta's teacher_checkpoint.pth."""
    return {"teacher": {**prefixed(state, "backbone."), **HEADS}}


class OwnDict(dict):  # type: ignore[type-arg]
    """A dict subclass, like the configurations of several libraries. torch refuses to fill it."""


BESIDE = {"epoch": 3, "args": argparse.Namespace(lr=1e-3), "optimizer": {"state": {0: {"exp_avg": torch.ones(999)}}}}


def save_sharded(state: State, folder: Path) -> Path:
    """Write a folder with two safetensors files and their index."""
    folder.mkdir()
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        safetensors.torch.save_file(part, folder / file)
    weight_map = {key: file for file, part in zip(files, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def original_mapping(state: State, prefix: str = "") -> State:
    """Apply the original script's mapping. It is independent of streamconv's rules, which are compared with it."""
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


def timm_state(registers: int = 0, embedded: int = 0, *, is_packed: bool = False) -> State:
    """Return a random backbone in timm's layout, whose first ``embedded`` tokens have position embeddings."""
    state, _ = make_states(replace(tiny(swiglu=is_packed, registers=registers), has_mask_token=False))
    state = {key.replace("w12", "fc1").replace("w3", "fc2"): value for key, value in state.items()}
    if registers:
        state["reg_token"] = state.pop("register_tokens")
    generator = torch.Generator().manual_seed(1)
    state["pos_embed"] = torch.randn((1, 16 + embedded, 128), generator=generator) * 0.1
    return state


def timm_mapping(state: State) -> State:
    """Return transformers' tensors for those in timm's layout. It is independent of streamconv's rules."""
    state, positions = dict(state), state["pos_embed"]
    if state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]:
        state = {key.replace("fc1", "w12").replace("fc2", "w3"): value for key, value in state.items()}
    if (registers := state.pop("reg_token", None)) is not None:
        if (last := positions.shape[1] - 16) > 1:
            registers = registers + positions[:, 1:last]
            positions = torch.cat((positions[:, :1], positions[:, last:]), dim=1)
        state |= {"register_tokens": registers, "mask_token": torch.zeros(1, 128, dtype=positions.dtype)}
    if positions.shape[1] == 16:
        positions = torch.cat((torch.zeros(1, 1, 128, dtype=positions.dtype), positions), dim=1)
    return original_mapping(state | {"pos_embed": positions})


def wanted(state: State, path: Path) -> bytes:
    """Return the bytes that the safetensors library writes for the original script's mapping."""
    safetensors.torch.save_file(original_mapping(state), path, metadata={"format": "pt"})
    return path.read_bytes()


def alter(folder: Path, change: Callable[[State], object]) -> None:
    """Change the tensors of a converted folder."""
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})


def checkpoint_with_settings(what: str) -> tuple[State, dict[str, Any]]:
    """Return a backbone, and a checkpoint that also holds an object of a class that torch refuses to load."""
    state, _ = make_states(tiny())
    settings = {
        "a namespace": argparse.Namespace(lr=1), "a dict of its own class": OwnDict(lr=1),
        "a whole module": torch.nn.Linear(2, 2),
    }[what]  # fmt: skip
    return state, {"model": state, "settings": settings}


# Reverting


def original_states(dimensions: Dimensions, dtype: torch.dtype = torch.float32) -> tuple[State, State]:
    """Return a random backbone and head (empty without classes), in the order of the original's state dict."""
    model = original.build(dimensions).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    state = model.state_dict()
    backbone = {key: value for key, value in state.items() if not key.startswith(HEAD)}
    return backbone, {key.removeprefix(HEAD): value for key, value in state.items() if key.startswith(HEAD)}


def converted_folder(
    tmp_path: Path, dimensions: Dimensions, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """Convert `original_states`, and return the folder without its configuration files."""
    backbone, head = original_states(dimensions, dtype)
    torch.save(backbone, tmp_path / "source.pth")
    torch.save(head, tmp_path / "source_head.pth")
    head_path = tmp_path / "source_head.pth" if head else None
    folder = api.convert(tmp_path / "source.pth", tmp_path / "folder", head=head_path, **options).output
    for path in (tmp_path / "source.pth", tmp_path / "source_head.pth", *folder.glob("*config.json")):
        path.unlink()
    return folder


def assert_same(state: State, path: Path) -> None:
    """Assert that ``path`` holds what torch.save or safetensors' save_file would write for ``state``."""
    if path.suffix == ".safetensors":
        assert path.read_bytes() == safetensors.torch.save(state, metadata={"format": "pt"})
        return
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(state)
        for key, value in loaded.items():
            assert (value.dtype, value.shape) == (state[key].dtype, state[key].shape), key
            assert torch.equal(value.view(torch.uint8), state[key].view(torch.uint8)), key


# Arbitrary tensors, and their contents as they are read

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32,
    torch.uint64,
)  # fmt: skip
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=50).filter(str.isprintable)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes in row-major order, by torch."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copy.reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """Draw a view of random bytes: sliced, stepped, permuted, expanded, empty, 0-d, at an offset."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = int(torch.tensor(shape).prod()) if shape else 1
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    for dim in range(tensor.ndim):
        start, step = draw(st.integers(0, 2)), draw(st.integers(1, 3))
        tensor = tensor.narrow(dim, min(start, tensor.shape[dim]), max(0, tensor.shape[dim] - start))
        if tensor.shape[dim]:
            tensor = tensor[(slice(None),) * dim + (slice(None, None, step),)]
    if draw(st.booleans()) and tensor.ndim:
        tensor = tensor.permute(draw(st.permutations(range(tensor.ndim))))
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(draw(st.integers(0, tensor.ndim))).expand(
            [draw(st.integers(1, 3)) if n == 1 else n for n in tensor.unsqueeze(0).shape]
        ) if tensor.ndim == 0 else tensor  # fmt: skip
    return tensor


EVERY_KIND: State = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "view": torch.arange(12.0).reshape(3, 4).t()[1:],
    "half": torch.arange(4, dtype=torch.float16),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "fp8": torch.ones(3).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(7),
    "empty": torch.ones(0, 3),
}


def read_or_refuse(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return the dtype, shape and bytes of each tensor as streamconv reads them; None if it refuses the file."""
    try:
        with streamconv.open_checkpoint(path) as checkpoint:
            return {name: (t.info.dtype, t.info.shape, read_bytes(t)) for name, t in checkpoint.items()}
    except SourceError:
        return None


def described(state: State) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return the dtype, shape and bytes of each tensor as torch has them."""
    codes = {v: k for k, v in safetensors.torch._TYPES.items()}
    return {name: (codes[value.dtype], tuple(value.shape), bytes_of(value)) for name, value in state.items()}
