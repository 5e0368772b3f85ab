"""Verification of checkpoints with another layout, dtype or origin than the published ones."""

import json
import math
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

import streamconv
from streamconv import MappingError
from streamconv.families.dinov2_geometry import Dimensions
from streamconv.hub.card import make_card
from streamconv.output.manifest import Manifest
from streamconv.verification.originals import dinov2 as original
from tests import api
from tests.checkpoints import (
    BESIDE,
    HEAD,
    checkpoint_with_settings,
    chunked,
    make_states,
    mixed_state,
    prefixed,
    save_sharded,
    saved,
    state_of,
    teacher,
)
from tests.file_server import FileServer
from tests.support import Save, rewrite, tiny


# Every pair of values of two parameters occurs once.
@pytest.mark.parametrize(
    ("swiglu", "registers", "chunk", "wrap"),
    [(False, 0, 0, "bare"), (False, 4, 1, "teacher"), (True, 0, 1, "teacher"), (True, 4, 0, "teacher"),
     (True, 4, 1, "bare")],
)  # fmt: skip
def test_every_layout_computes_the_same(tmp_path: Path, swiglu: bool, registers: int, chunk: int, wrap: str) -> None:
    state, _ = make_states(tiny(swiglu=swiglu, registers=registers))
    named = chunked(state, chunk) if chunk else state
    source = saved({**teacher(named), **BESIDE} if wrap == "teacher" else named, tmp_path / "x.pth")
    api.convert(source, tmp_path / "out")
    found = api.verify(tmp_path / "out", source, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").numbers["largest"] <= (1e-15 if swiglu else 0.0)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
@pytest.mark.parametrize("what", ["a namespace", "a whole module", "a dict of its own class"])
@pytest.mark.filterwarnings("ignore")
def test_checkpoint_with_objects_that_torch_refuses_is_verified(
    tmp_path: Path, what: str, options: dict[str, Any]
) -> None:
    """torch loads the weights of the original, with stand-ins for the objects; so nothing is left unchecked."""
    state, checkpoint = checkpoint_with_settings(what)
    torch.save(checkpoint, tmp_path / "x.pth", **options)
    with pytest.raises(Exception, match="nsupported"):
        torch.load(tmp_path / "x.pth", weights_only=True)
    api.convert(tmp_path / "x.pth", tmp_path / "out")
    found = api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").numbers["largest"] == 0.0
    assert "reader" not in found.check("parity").not_checked
    wrong = {**state, "blocks.1.norm1.bias": state["blocks.1.norm1.bias"] + 1}
    torch.save({**checkpoint, "model": wrong}, tmp_path / "x.pth", **options)
    assert api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu").check("parity").passed is False


def test_checkpoint_that_torch_does_not_load_is_verified_and_reported(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_with_settings("a namespace")
    path = saved(checkpoint, tmp_path / "x.pth")
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("x/data.pkl")
    called_twice = b"cmine\nThing\n)R)\x81"  # an object in the place of a class
    rewrite(path, {"data.pkl": pickled[:-2] + b"X\x01\x00\x00\x00y" + called_twice + b"u."})
    api.convert(path, tmp_path / "out")
    found = api.verify(tmp_path / "out", path, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").not_checked.startswith(
        "torch.load does not load the source, so streamconv's reader also read the original model's weights"
    )


LACKING: dict[str, tuple[Dimensions, str]] = {
    "no LayerScale": (replace(tiny(), has_layer_scale=False), "the source has no LayerScale: ones are written"),
    "no mask token": (replace(tiny(), has_mask_token=False), ""),
    "registers and no mask token": (
        replace(tiny(registers=4), has_mask_token=False), "the source has no mask token: zeros are written"
    ),
    "no bias of q, k and v": (replace(tiny(), has_qkv_bias=False), ""),
    "no bias of proj": (replace(tiny(), has_proj_bias=False), "the source has no bias in attn.proj: zeros are written"),
    "no bias of fc1 and fc2": (replace(tiny(), has_ffn_bias=False), "the source has no bias in mlp: zeros are written"),
    "no bias of w12 and w3": (
        replace(tiny(swiglu=True), has_ffn_bias=False), "the source has no bias in mlp: zeros are written"
    ),
    "no bias at all": (
        replace(tiny(classes=5, registers=4), has_qkv_bias=False, has_proj_bias=False, has_ffn_bias=False,
                has_patch_bias=False),
        "the source has no bias in attn.proj, mlp, patch_embed.proj: zeros are written, which have no effect",
    ),
    "masked_embed": (replace(tiny(), patch=16, has_layer_scale=False, mask_key="masked_embed"), ""),
    "no registers in a tensor": (replace(tiny(), has_empty_registers=True), ""),
    "larger patches": (replace(tiny(), patch=16), ""),
    "another grid": (replace(tiny(), positions=50), ""),
    "four heads": (replace(tiny(), heads=4), "4 attention heads, as given by --num-heads"),
    "26 heads": (replace(tiny(hidden=1664, layers=1), heads=26), "26 attention heads, as given by --num-heads"),
}  # fmt: skip


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("what", "dtype"),
    [*((what, None) for what in LACKING), ("no LayerScale", "bfloat16"), ("registers and no mask token", "bfloat16")],
)
def test_models_with_missing_parts_or_other_sizes_are_converted_and_verified(
    tmp_path: Path, what: str, dtype: str | None
) -> None:
    dimensions, note = LACKING[what]
    state, head = make_states(dimensions)
    source = saved(state, tmp_path / "x.pth")
    head_path = saved(head, tmp_path / "head.pth") if head else None
    options = {"num_heads": dimensions.heads, "dtype": dtype, "head": head_path}
    done = api.convert(source, tmp_path / "out", **options)
    assert note in " ".join(done.plan.notes)
    found = api.verify(tmp_path / "out", source, head=head_path, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    # A CPU may round a product without a bias differently from one with zeros; then float64 decides.
    assert found.check("parity").numbers["largest"] <= (0.0 if dimensions.has_ffn_bias else 1e-13)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["patch_size"] == dimensions.patch
    assert config["image_size"] == dimensions.patch * math.isqrt(dimensions.positions - 1)
    assert config["qkv_bias"] is dimensions.has_qkv_bias
    assert config["num_attention_heads"] == {"four heads": 4, "26 heads": 26}.get(what, 2)
    kind = getattr(transformers, config["architectures"][0])
    _, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    if not dimensions.has_layer_scale:
        scales = [value for name, value in tensors.items() if name.endswith(".lambda1")]
        assert len(scales) == 2 * dimensions.layers
        assert all(torch.equal(scale.float(), torch.ones(128)) for scale in scales)
    lacking = {
        "attention.output.dense.bias": dimensions.has_proj_bias,
        "patch_embeddings.projection.bias": dimensions.has_patch_bias,
        **dict.fromkeys(("fc1.bias", "fc2.bias", "weights_in.bias", "weights_out.bias"), dimensions.has_ffn_bias),
    }
    for ending, is_there in lacking.items():
        assert all(value.any() == is_there for name, value in tensors.items() if name.endswith(ending)), ending
    if dimensions.registers:
        prefix = "dinov2_with_registers." if dimensions.classes else ""
        mask = tensors[f"{prefix}embeddings.mask_token"].float()
        assert torch.equal(mask, torch.zeros(1, 128)) is not dimensions.has_mask_token
    elif dimensions.has_mask_token:
        assert torch.equal(
            tensors["embeddings.mask_token"], state[dimensions.mask_key].to(getattr(torch, dtype or "float32"))
        )
        assert config["use_mask_token"] is True
    else:
        assert config["use_mask_token"] is dimensions.has_mask_token is ("embeddings.mask_token" in tensors)
    assert done.plan.parameters == sum(value.numel() for value in tensors.values())


@pytest.mark.parametrize("geometry", [tiny(), tiny(swiglu=True, classes=5, registers=4)], ids=["plain", "all"])
def test_converted_folder_that_was_converted_again_passes(tmp_path: Path, geometry: Dimensions) -> None:
    backbone, head = make_states(geometry)
    source, head_path = saved(backbone, tmp_path / "x.pth"), saved(head, tmp_path / "h.pth") if head else None
    api.convert(source, tmp_path / "first", head=head_path)
    api.convert(tmp_path / "first", tmp_path / "second", dtype="bfloat16", max_shard_size="150KB")
    found = api.verify(tmp_path / "second", tmp_path / "first", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert found.check("parity").numbers["largest"] <= 1e-13


@pytest.mark.transformers
def test_folder_saved_by_transformers_can_be_converted(tmp_path: Path, server: FileServer) -> None:
    """The number of heads comes from its config.json; a remote file is read like any other."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes))
    model.save_pretrained(tmp_path / "theirs")
    api.convert(tmp_path / "theirs", tmp_path / "ours")
    again = Dinov2Model.from_pretrained(tmp_path / "ours")
    assert again.config.num_attention_heads == 3
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert api.verify(tmp_path / "ours", tmp_path / "theirs", device="cpu").passed
    (tmp_path / "served" / "x.safetensors").write_bytes((tmp_path / "theirs" / "model.safetensors").read_bytes())
    address = f"{server.url}/x.safetensors"
    with pytest.raises(
        MappingError, match=r"models of hidden size 96 do not agree on one: give the number with --num-heads"
    ):
        api.plan(address)
    api.convert(address, tmp_path / "far", num_heads=3, dtype="float16", stream=True)
    found = api.verify(tmp_path / "far", address, stream=True, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks


@pytest.mark.parametrize(("dtype", "classes"), [("bfloat16", 5), ("float16", None)])
def test_correct_cast_passes_every_check_exactly(tmp_path: Path, save: Save, dtype: str, classes: int | None) -> None:
    source, head = save(tiny(classes=classes))
    api.convert(source, tmp_path / "out", head=head, dtype=dtype)
    found = api.verify(tmp_path / "out", source, head=head, device="cpu")
    assert found.passed
    assert [check.passed for check in found.checks] == [True] * 5
    assert f"equals its source's after the cast from float32 to {dtype};" in found.check("bytes").proves
    assert found.check("parity").numbers["largest"] <= found.check("parity").numbers["tolerance"] < 1e-12
    assert api.verify(tmp_path / "out").passed


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float16", "bfloat16"), ("bfloat16", "float32"), ("float64", "float32")]
)
def test_casts_from_other_dtypes_pass_every_check(tmp_path: Path, stored: str, dtype: str) -> None:
    torch.save(state_of(stored), tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "out", dtype=dtype)
    found = api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found


def test_mixed_dtypes_cast_to_one_pass_every_check(tmp_path: Path) -> None:
    source = saved(mixed_state(), tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", dtype="bfloat16")
    found = api.verify(tmp_path / "out", source, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks


def test_sharded_safetensors_source_passes_every_check(tmp_path: Path) -> None:
    backbone, _ = make_states(tiny())
    source = save_sharded(prefixed(chunked(backbone, 1), "backbone."), tmp_path / "source")
    api.convert(source, tmp_path / "out")
    assert api.verify(tmp_path / "out", source, device="cpu").passed


def test_legacy_source_passes_every_check(tmp_path: Path) -> None:
    torch.save(make_states(tiny())[0], tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    api.convert(tmp_path / "x.pth", tmp_path / "out")
    assert api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu").passed


def test_selection_recorded_in_the_manifest_is_verified(tmp_path: Path) -> None:
    states = {name: make_states(tiny(), seed)[0] for seed, name in enumerate(("teacher", "student"))}
    source = saved({name: prefixed(state, "backbone.") for name, state in states.items()}, tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", select="student.backbone")
    assert api.verify(tmp_path / "out", source, device="cpu").passed
    wrong = api.verify(tmp_path / "out", source, select="teacher.backbone", device="cpu")
    assert [wrong.check(name).passed for name in ("bytes", "load", "parity")] == [False, True, False]


def test_wrong_number_of_attention_heads_fails_parity(tmp_path: Path) -> None:
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", num_heads=4)
    found = api.verify(tmp_path / "out", source, num_heads=2, device="cpu")
    assert [found.check(name).passed for name in ("config", "parity")] == [False, False]


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("classes", "registers", "swiglu", "limit"),
    [(None, 0, False, "5GB"), (None, 3, True, "300KB"), (5, 0, True, "300KB"), (5, 3, False, "300KB"),
     (5, 3, True, "5GB")],
)  # fmt: skip
def test_reverted_transformers_model_loads_strictly_and_computes_the_same(
    tmp_path: Path, classes: int | None, registers: int, swiglu: bool, limit: str
) -> None:
    dimensions = tiny(swiglu, classes, registers=registers)
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14,
        use_swiglu_ffn=swiglu, num_labels=classes or 2, **({"num_register_tokens": registers} if registers else {}),
    )  # fmt: skip
    model = getattr(transformers, f"{kind}{'ForImageClassification' if classes else 'Model'}")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    model.save_pretrained(tmp_path / "folder", max_shard_size=limit)
    head_path = tmp_path / "head.pth" if classes else None
    streamconv.revert(tmp_path / "folder", tmp_path / "back.pth", head=head_path)

    state = torch.load(tmp_path / "back.pth", weights_only=True)
    if head_path:
        state |= {HEAD + key: value for key, value in torch.load(head_path, weights_only=True).items()}
    graph = original.build(dimensions).eval()
    assert list(state) == list(graph.state_dict())
    graph.load_state_dict(state, strict=True)
    # In float32, the two halves of transformers 5's SwiGLU are rounded differently from Meta's single layer.
    pixels = torch.randn(2, 3, 56, 56, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        states = dict(original.states(graph.double(), pixels))
        theirs = model.double()(pixels)
    if classes:
        compared = [(states["logits"], theirs.logits)]
    else:
        tokens = theirs.last_hidden_state
        compared = [(states["cls"][:, 0], theirs.pooler_output), (states["patches"], tokens[:, 1 + registers :])]
    for ours, other in compared:
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-13)

    again = api.convert(tmp_path / "back.pth", tmp_path / "again", head=head_path, max_shard_size=limit).output
    tensors = [
        {
            name: value
            for path in each.glob("*.safetensors")
            for name, value in safetensors.torch.load_file(path).items()
        }
        for each in (tmp_path / "folder", again)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


@pytest.mark.transformers
@pytest.mark.parametrize("classes", [None, 3])
def test_code_on_the_card_runs(
    tmp_path: Path, save: Save, classes: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, head = save(tiny(classes=classes))
    done = api.convert(backbone, tmp_path / "out", head=head)
    text = make_card(Manifest.read(done.output), "ada/it")
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert code.count("\n") == 4
    shutil.move(done.output, tmp_path / "ada" / "it")  # transformers loads a folder with the repository's name
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.strip() in (
        ["torch.Size([1, 257, 128])"] if classes is None else ["LABEL_0", "LABEL_1", "LABEL_2"]
    )
