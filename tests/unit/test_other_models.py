"""Checkpoints that fit no family are named, and none that fits one is.

tests/other_models.json has the names of tensors as timm 1.0.31 and transformers 5.24 save them, one for each module
and the first of numbered modules.
"""

import json
import re
import time

import pytest

from streamconv.families import other_models
from streamconv.families.registry import all_families, find_model, is_model
from streamconv.formats.limits import MAX_TENSORS
from tests.support import GOLDEN, ROOT, expanded

SAVED = {name: names.split() for name, names in json.loads((ROOT / "tests/other_models.json").read_bytes()).items()}
VIT = [
    "cls_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "blocks.0.norm1.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.mlp.fc1.weight",
    "norm.weight",
]
# By what they are, as their authors' code names them.
WRITTEN = {
    "convnext_tiny_1k_224_ema": "downsample_layers.0.0.weight stages.0.0.gamma stages.0.0.dwconv.weight head.weight",
    "convnextv2_tiny_1k_224_fcmae": "downsample_layers.0.0.weight stages.0.0.dwconv.weight stages.0.0.grn.gamma",
    "mae_visualize_vit_base": "cls_token pos_embed mask_token decoder_pos_embed patch_embed.proj.weight "
    "blocks.0.norm1.weight norm.weight decoder_embed.weight decoder_blocks.0.attn.qkv.weight decoder_pred.weight",
    "CLIP ViT-B/32": "positional_embedding text_projection logit_scale visual.class_embedding visual.conv1.weight "
    "visual.ln_pre.weight visual.transformer.resblocks.0.attn.in_proj_weight transformer.resblocks.0.ln_1.weight "
    "token_embedding.weight ln_final.weight",
    "open_clip SigLIP": "logit_scale logit_bias visual.trunk.patch_embed.proj.weight "
    "visual.trunk.blocks.0.norm1.weight "
    "visual.trunk.attn_pool.latent text.transformer.resblocks.0.ln_1.weight text.token_embedding.weight",
    "beit_large": "cls_token mask_token patch_embed.proj.weight blocks.0.gamma_1 blocks.0.attn.q_bias "
    "blocks.0.attn.relative_position_bias_table blocks.0.attn.qkv.weight norm.weight lm_head.weight",
    "sam_vit_h": "image_encoder.pos_embed image_encoder.patch_embed.proj.weight image_encoder.blocks.0.norm1.weight "
    "image_encoder.blocks.0.attn.rel_pos_h image_encoder.neck.0.weight prompt_encoder.not_a_point_embed.weight "
    "mask_decoder.iou_token.weight",
    "MMPretrain vit-base_dinov2": "backbone.cls_token backbone.pos_embed backbone.patch_embed.projection.weight "
    "backbone.layers.0.ln1.weight backbone.layers.0.attn.qkv.weight backbone.layers.0.ffn.layers.0.0.weight "
    "backbone.layers.0.gamma1.weight backbone.ln1.weight head.fc.weight",
    "MMSegmentation vit": "backbone.cls_token backbone.patch_embed.projection.weight backbone.layers.0.ln1.weight "
    "backbone.layers.0.attn.attn.in_proj_weight backbone.layers.0.ffn.layers.0.0.weight decode_head.conv_seg.weight",
    "torchvision resnet50": "conv1.weight bn1.weight layer1.0.conv1.weight layer1.0.bn1.weight fc.weight",
    "torchvision fasterrcnn": "backbone.body.conv1.weight backbone.body.layer1.0.conv1.weight "
    "backbone.body.layer1.0.bn1.weight backbone.fpn.inner_blocks.0.0.weight rpn.head.cls_logits.weight "
    "roi_heads.box_head.fc6.weight",
    "yolov8n": "model.0.conv.weight model.2.cv1.conv.weight model.2.m.0.cv1.conv.weight model.22.dfl.conv.weight",
    "stable-diffusion-v1": "model.diffusion_model.input_blocks.0.0.weight first_stage_model.encoder.conv_in.weight "
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight alphas_cumprod",
    "diffusers unet": "conv_in.weight time_embedding.linear_1.weight down_blocks.0.resnets.0.conv1.weight "
    "up_blocks.0.resnets.0.conv1.weight mid_block.resnets.0.conv1.weight",
    "llava": "language_model.model.embed_tokens.weight language_model.lm_head.weight "
    "vision_tower.vision_model.embeddings.patch_embedding.weight "
    "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight multi_modal_projector.linear_1.weight",
}
ARCHITECTURES = {
    "convnext_tiny_1k_224_ema": ["looks like a ConvNeXt model"],
    "convnextv2_tiny_1k_224_fcmae": ["looks like a ConvNeXt model"],
    "timm vit_small_patch16_dinov3": ["looks like a DINOv3 model in timm's names"],
    "mae_visualize_vit_base": ["is an MAE with its decoder"],
    "transformers ViTMAEForPreTraining": ["is an MAE with its decoder"],
    "beit_large": ["looks like a BEiT or EVA model"],
    "timm beit_base_patch16_224": ["looks like a BEiT or EVA model"],
    "timm eva02_base_patch14_448": ["looks like a BEiT or EVA model"],
    "timm eva_giant_patch14_224": ["looks like a BEiT or EVA model"],
    "transformers BeitModel": ["looks like a BEiT or EVA model"],
    "transformers Data2VecVisionModel": ["looks like a BEiT or EVA model"],
    "timm deit_base_distilled_patch16_224": ["is a DeiT model with a distillation token"],
    "transformers DeiTModel": ["is a DeiT model with a distillation token"],
    "transformers ViTForImageClassification": ["looks like a ViT in transformers' names"],
    "transformers ViTMSNModel": ["looks like a ViT in transformers' names"],
    "transformers VideoMAEModel": ["looks like a ViT in transformers' names"],
    "transformers DPTForDepthEstimation": ["looks like a ViT in transformers' names"],
    "CLIP ViT-B/32": ["looks like a CLIP or SigLIP model"],
    "open_clip SigLIP": ["looks like a CLIP or SigLIP model"],
    "timm vit_base_patch16_clip_224": ["looks like a CLIP or SigLIP model"],
    "timm vit_base_patch16_siglip_224": ["looks like a CLIP or SigLIP model"],
    "transformers CLIPModel": ["looks like a CLIP or SigLIP model"],
    "transformers CLIPVisionModel": ["looks like a CLIP or SigLIP model"],
    "transformers SiglipModel": ["looks like a CLIP or SigLIP model"],
    "transformers SiglipVisionModel": ["looks like a CLIP or SigLIP model"],
    "sam_vit_h": ["looks like a SAM model"],
    "timm samvit_base_patch16": ["looks like a SAM model"],
    "transformers SamModel": ["looks like a SAM model"],
    "MMPretrain vit-base_dinov2": ["has the names of OpenMMLab's MMPretrain or MMSegmentation"],
    "MMSegmentation vit": ["has the names of OpenMMLab's MMPretrain or MMSegmentation"],
    "timm swin_tiny_patch4_window7_224": ["looks like a Swin Transformer"],
    "timm swinv2_tiny_window8_256": ["looks like a Swin Transformer"],
    "transformers SwinModel": ["looks like a Swin Transformer"],
    "timm convnext_tiny": ["looks like a ConvNeXt model"],
    "transformers ConvNextModel": ["looks like a ConvNeXt model"],
    "torchvision resnet50": ["looks like a ResNet"],
    "transformers ResNetModel": ["looks like a ResNet"],
    "torchvision fasterrcnn": ["looks like a ResNet", "looks like an object detector"],
    "transformers DetrForObjectDetection": ["looks like a ResNet", "looks like an object detector"],
    "yolov8n": ["looks like an object detector"],
    "stable-diffusion-v1": ["looks like a diffusion model"],
    "diffusers unet": ["looks like a diffusion model"],
    "transformers LlamaForCausalLM": ["looks like a language model"],
    "transformers GPT2LMHeadModel": ["looks like a language model"],
    "transformers BertModel": ["looks like a language model"],
    "llava": ["looks like a CLIP or SigLIP model", "looks like a language model"],
}
STORAGE = {
    "is one process's part of a model that FSDP sharded": [
        ["_flat_param"], ["blocks.0._fsdp_wrapped_module._flat_param"],
    ],
    "is the state of a DeepSpeed optimizer": [["optimizer_state_dict.fp32_flat_groups.0"]],
    "has adapters of PEFT, such as LoRA, that are not merged": [
        ["blocks.0.attn.qkv.base_layer.weight", f"blocks.0.attn.qkv.{name}"]
        for name in ("lora_A.default.weight", "hada_w1_a.default", "lokr_w1.default", "ia3_l.default")
    ],
    "holds adapters, such as LoRA, without their model": [
        ["base_model.model.blocks.0.attn.qkv.lora_A.weight", "base_model.model.blocks.0.attn.qkv.lora_B.weight"],
        ["lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.lora_up.weight"],
    ],
    "is quantised by bitsandbytes": [
        [*VIT, "blocks.0.attn.qkv.weight.absmax", "blocks.0.attn.qkv.weight.quant_map",
         "blocks.0.attn.qkv.weight.quant_state.bitsandbytes__nf4"],
        [*VIT, "blocks.0.attn.qkv.SCB", "blocks.0.attn.qkv.weight_format"],
    ],
    "is quantised by GPTQ": [[f"blocks.0.mlp.fc1.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]],
    "is quantised by AWQ": [[f"blocks.0.mlp.fc1.{part}" for part in ("qweight", "qzeros", "scales")]],
    "looks quantised by torch": [["fc.scale", "fc.zero_point", "fc._packed_params._packed_params"]],
    "looks quantised: it has scales of weights": [
        [*VIT, "blocks.0.attn.qkv.weight_scale_inv"], [*VIT, "blocks.0.attn.qkv.weight_scale"],
        ["blocks.0.attn.qkv.weight_packed", "blocks.0.attn.qkv.weight_scale"],
    ],
    "has the names that transformers 5 uses in memory": [
        ["embeddings.cls_token", "encoder.layer.0.attention.q_proj.weight", "encoder.layer.0.mlp.gate_proj.weight"]
    ],
}  # fmt: skip


def kinds(names: list[str]) -> list[str]:
    return [kind.what for kind, _ in other_models._by_name(names)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_told_apart(name: str) -> None:
    names = SAVED[name] if name in SAVED else WRITTEN[name].split()
    assert kinds(names) == ARCHITECTURES[name]
    assert kinds([f"state_dict.module.{each}" for each in names]) == ARCHITECTURES[name]
    error = other_models.recognise(dict.fromkeys(names, (1,)), "x.pth")
    assert error is not None
    assert all(what in str(error) for what in ARCHITECTURES[name])
    known = "dinov2, dinov3 and dinov3_convnext"
    assert f"streamconv converts {known}, in their authors' or transformers' names." in str(error)
    assert error.problems == ()
    (evidence, *_) = re.findall(r"\((\S+)\)", str(error))
    assert evidence in names


@pytest.mark.parametrize(("what", "names"), [(what, names) for what, samples in STORAGE.items() for names in samples])
def test_ways_to_store_weights_are_told_apart(what: str, names: list[str]) -> None:
    assert kinds(names) == [what]
    error = other_models.recognise(dict.fromkeys(names, (1,)), "x.pth")
    assert str(error).startswith(f"x.pth {what} (")
    assert "streamconv converts" not in str(error)


@pytest.mark.parametrize("name", sorted({*SAVED, *WRITTEN} - {*ARCHITECTURES}))
def test_other_models_are_not_given_a_name(name: str) -> None:
    """Some of them can be converted, such as a ViT of timm, which is DINOv2 without LayerScale and mask token."""
    assert kinds(SAVED[name]) == []


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("name", GOLDEN)
def test_published_models_are_not_given_another_name(name: str, side: str) -> None:
    golden = GOLDEN[name]
    shapes = expanded(golden[side], golden["layers"], golden.get("chunks", ()))
    beside = dict.fromkeys(
        ("dino_head.mlp.0.weight", "dino_head.last_layer.weight_g", "ibot_head.mlp.0.bias", "head.mlp.0.weight",
         "linear_head.weight", "masked_embed", "epoch"), (1,)
    )  # fmt: skip
    for prefix in ("", "teacher.backbone.", "student.module."):
        named = {f"{prefix}{key}": shape for key, shape in shapes.items()}
        assert other_models.recognise({**named, **beside}, "x.pth") is None
        assert other_models.recognise(named, "x.pth", ranks={key: len(shape) for key, shape in named.items()}) is None


def test_weights_that_are_elsewhere_are_named_by_their_shapes() -> None:
    ranks = {"a.weight": 2, "b.weight": 4, "norm.weight": 1}
    for shapes, what in (
        ({"a.weight": (0,), "b.weight": (0,), "norm.weight": (8,)}, "holds empty tensors .* ZeRO-3"),
        ({"a.weight": (0,), "b.weight": (7,), "norm.weight": (0,)}, "is one process's part of a model that FSDP"),
        ({"a.weight": (8, 8), "b.weight": (7,)}, None),
        ({"norm.weight": (8,)}, None),
        ({}, None),
    ):
        error = other_models.recognise(shapes, "x.pth", ranks=ranks)
        assert error is None if what is None else re.match(f"x.pth {what}", str(error)), shapes
    assert "zero_to_fp32 FOLDER" in str(other_models.recognise({"any": (0,), "name": (0,)}, "x.pth"))
    assert other_models.recognise({"any": (0,), "name": (1,)}, "x.pth") is None


def test_model_without_a_norm_of_every_token_is_named() -> None:
    pooled = [*VIT[:-1], "blocks.0.attn.qkv.bias", "fc_norm.weight", "fc_norm.bias"]
    assert kinds(pooled) == ["normalises only what it has pooled"]
    assert kinds([*pooled, "norm.weight"]) == []


def test_message_shows_the_name_in_the_file_made_printable() -> None:
    error = other_models.recognise({"a\nb": (1,), "x.7.lm_head\n\x1b": (1,), "y.lm_head.\x1b[31m": (1,)}, "x.pth")
    assert "(y.lm_head.\\x1b[31m)" in str(error)


def test_the_largest_index_is_searched_in_seconds() -> None:
    names = {f"layer.{i}.{'x' * 500}.weight": (1,) for i in range(MAX_TENSORS)}
    start = time.process_time()
    assert other_models.recognise(names, "x.pth") is None
    assert time.process_time() - start < 10


def test_marks_have_the_form_that_is_searched() -> None:
    marks = [
        mark
        for kind in (*other_models.ARCHITECTURES, *other_models.HOSTS, *other_models.STORAGE)
        for mark in kind.marks
    ]
    assert len({*marks}) == len(marks)
    for mark in marks:
        assert re.fullmatch(r"!?[a-zA-Z0-9_{}.]+( !?[a-zA-Z0-9_{}.]+)*", mark), mark
        assert not mark.startswith("!")
    known = {find_model(name)[0].name for name in GOLDEN if is_model(name)}  # of which a test above has the names
    assert {family.name for family in all_families()} == known
