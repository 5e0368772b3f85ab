"""Verification passes correct DINOv3 ViTs exactly, states what rounded periods change, and finds wrong ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from streamconv import Verification
from streamconv.families.dinov3 import conversion_spec
from streamconv.families.dinov3_geometry import Dimensions
from streamconv.verification.originals import dinov3
from tests import api
from tests.checkpoints import State, alter, saved
from tests.engine.test_dinov3 import SIZES, VARIANTS, make_state, mapped
from tests.support import problems, run, verdicts

PASSED = {"bytes": True, "config": True, "load": True, "parity": True, "preprocessing": True}


def verified(state: State, folder: Path, **options: Any) -> Verification:
    source = saved(state, folder / "x.pth")
    api.convert(source, folder / "out", **options)
    return api.verify(folder / "out", source, device="cpu")


def test_correct_conversion_passes_every_check_exactly(tmp_path: Path) -> None:
    found = verified(make_state(), tmp_path)
    assert verdicts(found) == PASSED, problems(found)
    parity = found.check("parity").numbers
    assert list(parity["differences"]) == ["embeddings", "layer 0", "layer 1", "cls", "registers", "patches"]
    assert parity["tolerance"] <= 1e-13
    # The number of heads is in the file, but nothing shows the epsilon.
    assert found.conclusion.kind == "incomplete"
    assert "the layer norms' epsilon is assumed to be 1e-05" in found.conclusion.details


@pytest.mark.parametrize("name", VARIANTS)
def test_original_computes_what_transformers_computes(name: str) -> None:
    sizes, state = VARIANTS[name], make_state(VARIANTS[name])
    model = dinov3.build(sizes)
    model.load_state_dict(state, strict=True)
    config = transformers.DINOv3ViTConfig(**dict(conversion_spec(sizes).config))
    theirs = transformers.DINOv3ViTModel.from_pretrained(None, config=config, state_dict=mapped(state))
    for parameter in theirs.parameters():  # not the periods, which transformers computes in float32
        parameter.data = parameter.double()
    pixels = torch.randn(2, 3, 48, 80, dtype=torch.float64)
    with torch.no_grad():
        found = dict(dinov3.states(model.double(), pixels, as_transformers=True))
        expected = theirs(pixels, output_hidden_states=True)
    for i in range(sizes.layers):
        torch.testing.assert_close(found[f"layer {i}"], expected.hidden_states[i + 1], rtol=0, atol=1e-13)
    tokens = torch.cat([found[each] for each in dinov3.prefix_tokens(sizes)] + [found["patches"]], dim=1)
    torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=0, atol=1e-13)


def test_effect_of_the_files_rounded_periods_is_measured_and_stated(tmp_path: Path) -> None:
    state = make_state()
    for i in range(2):  # so that attention matters
        state[f"blocks.{i}.attn.qkv.weight"] *= 10
        state[f"blocks.{i}.ls1.gamma"] = torch.ones(128)
    found = verified(state, tmp_path)
    numbers = found.check("parity").numbers
    assert list(numbers["as_published"]) == ["cls", "registers", "patches"]
    assert numbers["as_published"]["patches"] > 1e-4 > numbers["absolute"]["patches"]
    shown = run("verify", "out", "x.pth", "--device", "cpu", cwd=tmp_path).stdout
    assert "by design, not an error: the original's RoPE periods, which its file rounds to bfloat16, change" in shown
    assert f"{numbers['as_published']['patches']:.3g} (patches)" in shown


def test_exact_periods_are_not_called_rounded(tmp_path: Path) -> None:
    state = make_state() | {"rope_embed.periods": 100 ** (torch.arange(16) / 16)}
    assert "as_published" not in verified(state, tmp_path).check("parity").numbers


def test_cast_output_passes_at_two_sizes(tmp_path: Path) -> None:
    """The cost of the cast is measured in bfloat16, which leaves transformers' float32 periods as they are."""
    source = saved(make_state(), tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", dtype="bfloat16", image_size=112)
    found = api.verify(tmp_path / "out", source, device="cpu", thorough=True)
    assert verdicts(found) == {**PASSED, "native": True}, problems(found)
    assert found.cast_cost is not None


def test_exchanged_layers_of_the_gate_are_found(tmp_path: Path) -> None:
    source = saved(make_state(VARIANTS["gated with biases"]), tmp_path / "x.pth")
    api.convert(source, tmp_path / "out")

    def exchange(state: State) -> None:
        one, other = (f"layer.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
        state[one], state[other] = state[other], state[one]

    alter(tmp_path / "out", exchange)
    found = api.verify(tmp_path / "out", source, device="cpu")
    assert verdicts(found) == {**PASSED, "bytes": False, "parity": False}
    assert "the first difference is in layer 1" in problems(found)


def test_other_base_of_rope_is_found(tmp_path: Path) -> None:
    source = saved(make_state(), tmp_path / "x.pth")
    api.convert(source, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "rope_theta": 10_000.0}))
    found = api.verify(tmp_path / "out", source, device="cpu")
    assert verdicts(found) == {**PASSED, "config": False, "parity": False}


def test_original_with_periods_of_another_base_is_not_compared_as_if_they_were_rounded() -> None:
    model = dinov3.build(SIZES)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.rope_embed.periods = 1000 ** (torch.arange(16) / 16)
    with pytest.raises(ValueError, match="not those of base 100"), torch.no_grad():
        list(dinov3.states(model, torch.randn(1, 3, 32, 32), as_transformers=True))


def test_first_half_of_the_angles_is_for_rows_and_the_second_for_columns() -> None:
    model = dinov3.build(Dimensions(hidden=64, layers=1, ffn=64))
    sin, cos = model.rope_embed(H=2, W=3)
    assert sin.shape == cos.shape == (6, 64)
    assert torch.equal(sin[:, :32], sin[:, 32:])
    assert torch.equal(cos[0, :16], cos[1, :16])  # of one row
    assert torch.equal(cos[0, 16:32], cos[3, 16:32])  # of one column


@pytest.mark.parametrize("sizes", [SIZES, replace(VARIANTS["biases of keys"], registers=0)])
def test_converted_source_is_verified(sizes: Dimensions, tmp_path: Path) -> None:
    source = saved(make_state(sizes), tmp_path / "x.pth")
    first = api.convert(source, tmp_path / "first").output
    api.convert(first, tmp_path / "second")
    found = api.verify(tmp_path / "second", first, device="cpu")
    assert verdicts(found) == PASSED, problems(found)
    assert "so streamconv's reader also read the original model's weights" in found.check("parity").not_checked
