"""The example in streamconv/families/README.md works as it is written there."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from streamconv import MappingError, families
from streamconv.families.registry import all_families
from tests import api
from tests.support import ROOT, run


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the example's module where families are found, next to the real ones."""
    text = (ROOT / "streamconv" / "families" / "README.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "toy.py").write_text(code, "utf-8")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    all_families.cache_clear()
    yield
    all_families.cache_clear()
    sys.modules.pop("streamconv.families.toy", None)


def make_state(layers: int = 2, hidden: int = 8) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.weight": (hidden, 3, 16, 16)}
    for i in range(layers):
        shapes |= {
            f"blocks.{i}.norm.weight": (hidden,),
            f"blocks.{i}.qkv.weight": (3 * hidden, hidden),
            f"blocks.{i}.mlp.weight": (hidden, hidden),
        }
    generator = torch.Generator().manual_seed(0)
    shapes["norm.weight"] = (hidden,)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def expected_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {
        "embeddings.projection.weight": state["patch_embed.weight"],
        "embeddings.projection.bias": torch.zeros(len(state["norm.weight"])),
        "layernorm.weight": state["norm.weight"],
    }
    for i in range(sum(key.endswith(".mlp.weight") for key in state)):
        layer = f"encoder.layers.{i}."
        query, key, value = state[f"blocks.{i}.qkv.weight"].chunk(3)
        result |= {
            f"{layer}layernorm.weight": state[f"blocks.{i}.norm.weight"],
            f"{layer}attention.q_proj.weight": query,
            f"{layer}attention.k_proj.weight": key,
            f"{layer}attention.v_proj.weight": value,
            f"{layer}mlp.weight": state[f"blocks.{i}.mlp.weight"],
        }
    return result


@pytest.mark.parametrize(("layers", "hidden", "model"), [(2, 8, "toy_small"), (3, 16, None)])
def test_example_family_converts_a_checkpoint(
    tmp_path: Path, toy: None, layers: int, hidden: int, model: str | None
) -> None:
    state = make_state(layers, hidden)
    torch.save({"teacher": {**state, "rope.periods": torch.ones(3)}}, tmp_path / "x.pth")
    done = api.convert(tmp_path / "x.pth", tmp_path / "out")
    assert (done.plan.family_name, done.plan.model_name) == ("toy", model)
    save_file({name: value.contiguous() for name, value in expected_of(state).items()}, tmp_path / "expected")
    written, expected = (load_file(path) for path in (tmp_path / "out" / "model.safetensors", tmp_path / "expected"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["ToyModel"]
    assert (config["hidden_size"], config["num_hidden_layers"]) == (hidden, layers)
    with pytest.raises(MappingError, match="drops tensors"):
        streamconv.revert(done.output, tmp_path / "back.pth")


def test_example_family_lists_every_tensor_that_does_not_fit(tmp_path: Path, toy: None) -> None:
    state = make_state()
    del state["blocks.1.mlp.weight"]
    torch.save({**state, "norm.weight": torch.ones(5)}, tmp_path / "x.pth")
    with pytest.raises(MappingError) as caught:
        api.plan(tmp_path / "x.pth")
    assert caught.value.problems == (
        "missing: blocks.1.mlp.weight [8, 8]",
        "wrong shape: norm.weight is [5], not [8]",
    )


def test_commands_named_with_the_example_work(tmp_path: Path, toy: None) -> None:
    text = (ROOT / "streamconv" / "families" / "README.md").read_text("utf-8")
    (line,) = re.findall(r"`(streamconv synth [^`]+)`", text)
    for command in line.split(" && "):
        assert run(*command.split()[1:], cwd=tmp_path).returncode == 0, command
    assert (tmp_path / "toy-small" / "model.safetensors").exists()
    assert "toy_small" in run("models", cwd=tmp_path).stdout
