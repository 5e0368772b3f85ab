"""Verification of checkpoints in timm's layouts, against a graph with timm's arithmetic."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from streamconv.verification.originals import dinov2 as original
from tests import api
from tests.checkpoints import TORCH_DTYPES, State, alter, original_states, saved, timm_state
from tests.file_server import FileServer
from tests.support import tiny

POSITIONS, REGISTERS = "embeddings.position_embeddings", "embeddings.register_tokens"


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("registers", "embedded", "is_packed"), [(4, 0, False), (0, 1, True), (8, 0, True), (4, 5, True), (0, 0, False)]
)
def test_every_layout_computes_the_same(tmp_path: Path, registers: int, embedded: int, is_packed: bool) -> None:
    source = saved(timm_state(registers, embedded, is_packed=is_packed), tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", num_heads=2)
    found = api.verify(tmp_path / "out", source, num_heads=2, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").numbers["largest"] <= (1e-15 if is_packed else 0.0)
    computed = "(1 is a sum or product of two)" in found.check("bytes").proves
    assert computed is (embedded > 1)
    assert ("SwiGLUPacked" in found.check("parity").not_checked) is is_packed


@pytest.mark.parametrize(("stored", "dtype"), [("float32", "bfloat16"), ("float16", "float32"), ("bfloat16", None)])
def test_registers_are_added_in_the_dtype_that_is_written(tmp_path: Path, stored: str, dtype: str | None) -> None:
    state = {key: value.to(TORCH_DTYPES[stored]) for key, value in timm_state(4, 5).items()}
    source = saved(state, tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", num_heads=2, dtype=dtype)
    found = api.verify(tmp_path / "out", source, num_heads=2, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").numbers["largest"] == 0.0


def test_streamed_source_is_verified(tmp_path: Path, server: FileServer) -> None:
    saved(timm_state(4, 5), server.folder / "x.pth")
    source = f"{server.url}/x.pth"
    api.convert(source, tmp_path / "out", num_heads=2, dtype="bfloat16", stream=True)
    found = api.verify(tmp_path / "out", source, num_heads=2, device="cpu", stream=True)
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").numbers["largest"] == 0.0


@pytest.mark.parametrize("swiglu", [False, True])
def test_authors_model_in_timms_layout_gives_the_authors_outputs(tmp_path: Path, swiglu: bool) -> None:
    """The layout is made as timm's _convert_dinov2 makes it: the CLS token's position embedding is added to it."""
    sizes = tiny(swiglu=swiglu, registers=4)
    theirs, _ = original_states(sizes)
    state = {key.replace("w12", "fc1").replace("w3", "fc2"): value for key, value in theirs.items()}
    del state["mask_token"]
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, 0]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    api.convert(saved(state, tmp_path / "x.pth"), tmp_path / "out", num_heads=2)
    model = original.build(sizes).eval()
    model.load_state_dict(theirs)
    converted = AutoModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for size in (56, 84):
            outputs = dict(original.states(model, pixels[..., :size, :size]))
            expected = torch.cat((outputs["cls"], outputs["registers"], outputs["patches"]), dim=1)
            found = converted(pixels[..., :size, :size]).last_hidden_state
            assert torch.allclose(found, expected, rtol=0, atol=1e-6 if swiglu else 0.0)


def swap_halves(state: State) -> None:
    name = "encoder.layer.1.mlp.weights_in.weight"
    state[name] = torch.cat([*reversed(state[name].chunk(2))])


def shift_positions(state: State) -> None:
    state[POSITIONS] = torch.cat((state[POSITIONS][:, 1:], state[POSITIONS][:, :1]), dim=1)


def lose_row_of_zeros(state: State) -> None:
    state[POSITIONS][:, 0] = state[POSITIONS][:, 1]


def forget_positions_of_registers(state: State) -> None:
    state[REGISTERS] = timm_state(4, 5, is_packed=True)["reg_token"]


MISTAKES = {
    swap_halves: (8, 0, "layer 1"),
    shift_positions: (8, 0, "embeddings"),
    lose_row_of_zeros: (8, 0, "embeddings"),
    forget_positions_of_registers: (4, 5, "embeddings"),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_planted_mistake_is_found_where_it_is(tmp_path: Path, mistake: object) -> None:
    registers, embedded, where = MISTAKES[mistake]  # type: ignore[index]
    source = saved(timm_state(registers, embedded, is_packed=True), tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", num_heads=2)
    alter(tmp_path / "out", mistake)  # type: ignore[arg-type]
    found = api.verify(tmp_path / "out", source, num_heads=2, device="cpu")
    assert [found.check(name).passed for name in ("bytes", "parity")] == [False, False]
    assert found.check("parity").numbers["first"] == where


def test_positions_at_other_sizes_are_resized_as_timm_does(tmp_path: Path) -> None:
    """Without registers, transformers has no antialiasing filter, which is reported; it decides nothing."""
    for registers in (0, 4):
        source = saved(timm_state(registers, 0), tmp_path / "x.pth")
        out = api.convert(source, tmp_path / str(registers), num_heads=2).output
        parity = api.verify(out, source, num_heads=2, device="cpu", thorough=True).check("parity")
        assert parity.passed
        assert ("antialiasing" in str(parity.numbers.get("known_difference"))) is not bool(registers)
