"""Files of other models, and of weights that are not whole, end in one sentence that says what they are."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from streamconv import MappingError
from tests import api
from tests.checkpoints import State, make_states, prefixed, saved
from tests.support import run, tiny

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def replaced(state: State, old: str, new: str) -> State:
    return {key.replace(old, new): value for key, value in state.items()}


def lora(state: State) -> State:
    wrapped = replaced(state, ".qkv.", ".qkv.base_layer.")
    return {**wrapped, **{f"blocks.{i}.attn.qkv.lora_A.default.weight": torch.ones(8, 128) for i in range(3)}}


def adapters(state: State) -> State:
    return {key: value for key, value in lora(state).items() if "lora_A" in key}


def mae(state: State) -> State:
    decoder = {"decoder_embed.weight": torch.ones(64, 128), "decoder_blocks.0.norm1.weight": torch.ones(64)}
    return {**state, "mask_token": torch.ones(1, 1, 64), "decoder_pos_embed": torch.ones(1, 17, 64), **decoder}


def clip(state: State) -> State:
    return {**state, "norm_pre.weight": torch.ones(128), "norm_pre.bias": torch.ones(128)}


def pieces(state: State) -> State:
    """FSDP's LOCAL_STATE_DICT of one of two processes, with use_orig_params."""
    half = len(state) // 2
    return {key: value.flatten() if i < half else value.new_empty(0) for i, (key, value) in enumerate(state.items())}


def placeholders(state: State) -> State:
    """Return DeepSpeed's ZeRO-3, which keeps small parameters whole."""
    return {key: value if "norm" in key else value.new_empty(0) for key, value in state.items()}


def bitsandbytes(state: State) -> State:
    large = [key for key in state if key.endswith("qkv.weight")]
    packed = {key: torch.ones(3 * 128 * 128 // 2, 1, dtype=torch.uint8) for key in large}
    return {**state, **packed, **{f"{key}.{part}": torch.ones(4) for key in large for part in ("absmax", "quant_map")}}


OTHERS: dict[Callable[[State], State], tuple[str, str, str]] = {
    lora: (
        "has adapters of PEFT, such as LoRA, that are not merged",
        "blocks.0.attn.qkv.lora_A.default.weight",
        "merge_and_unload()",
    ),
    adapters: (
        "holds adapters, such as LoRA, without their model",
        "blocks.0.attn.qkv.lora_A.default.weight",
        "PeftModel.from_pretrained",
    ),
    mae: ("is an MAE with its decoder", "decoder_embed.weight", "save it without the decoder's tensors"),
    clip: ("looks like a CLIP or SigLIP model", "norm_pre.", "streamconv converts dinov2"),
    pieces: ("is one process's part of a model that FSDP sharded", "", "FULL_STATE_DICT"),
    placeholders: ("holds empty tensors instead of weights", "", "zero_to_fp32"),
    bitsandbytes: ("is quantised by bitsandbytes", "blocks.0.attn.qkv.weight.quant_map", "dequantize()"),
}


@pytest.mark.parametrize("prefix", ["", "model.teacher.backbone."])
@pytest.mark.parametrize("make", OTHERS, ids=lambda make: make.__name__)
def test_one_sentence_says_what_a_file_is_and_what_to_do(
    tmp_path: Path, make: Callable[[State], State], prefix: str
) -> None:
    what, evidence, advice = OTHERS[make]
    state, _ = make_states(tiny())
    named = prefixed(make(state), prefix)
    saved(named, tmp_path / "x.pth")
    save_file(named, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        done = run("convert", name, "-o", "out", cwd=tmp_path)
        assert done.returncode == 3
        assert done.stderr.startswith(f"error: {name} {what}"), done.stderr
        (found, *_) = re.findall(r"\((\w[^ )]+\.[^ )]+|cls_token)\)", done.stderr)
        assert found in named
        assert evidence in found
        assert advice in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "what"),
    [("ViT", "looks like a ViT in transformers' names"), ("ViTMSN", "looks like a ViT in transformers' names"),
     ("DeiT", "is a DeiT model with a distillation token"), ("Beit", "looks like a BEiT or EVA model")],
)  # fmt: skip
def test_other_models_of_transformers_are_named(tmp_path: Path, kind: str, what: str) -> None:
    """Many of their tensors have the names of Dinov2Model's."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, intermediate_size=64)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(MappingError) as caught:
        api.plan(tmp_path / "theirs")
    assert str(caught.value).startswith(f"{tmp_path / 'theirs'} {what} (")


def test_state_dict_of_transformers_5_that_cuts_a_tensor_is_named(tmp_path: Path) -> None:
    """In memory, it cuts a SwiGLU's first layer in two, which the files that save_pretrained writes do not."""
    state = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, use_swiglu_ffn=True)).state_dict()
    if any("gate_proj" in name for name in state):
        with pytest.raises(MappingError, match=r"has the names that transformers 5 uses in memory .*save_pretrained"):
            api.plan(saved(state, tmp_path / "x.pth"))


def test_other_models_beside_a_backbone_do_not_name_it(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    beside = {
        "text.transformer.resblocks.0.ln_1.weight": torch.ones(128), "lm_head.weight": torch.ones(9, 128),
        "lora_A.weight": torch.ones(1, 1),
    }  # fmt: skip
    source = saved({**prefixed(state, "visual."), **beside}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"more than a backbone\. To skip other tensors, use --select visual"):
        api.plan(source)
    assert {each.reason for each in api.plan(source, select="visual").skipped} == {"not selected"}


@pytest.mark.parametrize("select", [None, ""])
def test_what_changes_the_computation_is_not_left_out(tmp_path: Path, select: str | None) -> None:
    """--select leaves out what no rule knows; CLIP has a norm before the first block, although the rest fits."""
    state, _ = make_states(tiny())
    with pytest.raises(MappingError, match=r"looks like a CLIP or SigLIP model \(norm_pre\.weight\)"):
        api.plan(saved(clip(state), tmp_path / "x.pth"), select=select)


def test_parts_of_a_larger_program_are_left_out_if_selected(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved({**state, "bbox_head.fc.weight": torch.ones(4, 128)}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"more than a backbone\. To skip other tensors, use --select ''"):
        api.plan(source)
    assert [each.start for each in api.plan(source, select="").skipped] == ["bbox_head."]


def test_image_encoder_of_sam_is_named_although_other_tensors_are_beside_it(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    encoder = {key: value for key, value in state.items() if key not in ("cls_token", "norm.weight", "norm.bias")}
    encoder["blocks.0.attn.rel_pos_h"] = torch.ones(27, 64)
    beside = {"mask_decoder.iou_token.weight": torch.ones(1, 4), "prompt_encoder.x.weight": torch.ones(2)}
    with pytest.raises(MappingError, match=r"looks like a SAM model \(image_encoder\.blocks\.0"):
        api.plan(saved({**prefixed(encoder, "image_encoder."), **beside}, tmp_path / "x.pth"))


def test_mistakes_in_a_known_model_are_listed(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    del state["blocks.0.norm1.bias"]
    state["cls_token"] = torch.ones(1, 128)
    with pytest.raises(MappingError) as caught:
        api.plan(saved(state, tmp_path / "x.pth"))
    assert list(caught.value.problems) == [
        "missing: blocks.0.norm1.bias [128]", "wrong shape: cls_token is [1, 128], not [1, 1, 128]"
    ]  # fmt: skip


ADAM = {"optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(9)}}}}


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (ADAM, "holds no backbone, but optimizer state"),
        (ADAM["optimizer"], "holds no backbone, but optimizer state"),
        ({"model": {"dino_head.mlp.0.weight": torch.ones(2, 2)}, **ADAM},
         "holds no backbone, but a head for training only, which no transformers class has and optimizer state"),
        ({"last_epoch": 3, "base_lrs": [0.1]}, "holds no tensor. Give the file of the model's weights"),
    ],
    ids=["optimizer", "its state dict", "head and optimizer", "scheduler"],
)  # fmt: skip
def test_files_of_training_without_the_model_are_named(tmp_path: Path, checkpoint: object, message: str) -> None:
    source = saved(checkpoint, tmp_path / "x.pth")
    with pytest.raises(MappingError) as caught:
        api.plan(source)
    assert str(caught.value).startswith(f"{source} {message}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_in_a_small_dtype_are_refused_with_those_that_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    state, _ = make_states(tiny())
    with pytest.raises(MappingError, match="; only F16, BF16, F32, F64 are converted"):
        api.plan(saved({key: value.to(dtype) for key, value in state.items()}, tmp_path / "x.pth"))
