"""DINOv2 (Oquab et al. 2023, https://github.com/facebookresearch/dinov2) to transformers' Dinov2Model.

With registers (Darcet et al. 2024) it is Dinov2WithRegistersModel, whose own default is another patch size.
Web-DINO (Fan et al. 2025, https://github.com/facebookresearch/webssl) is the same architecture, up to 7B.
"""

import math
from typing import Any

from streamconv.families.aspects import AttentionHeads, BlockChunks, ClassifierHead, ExtraPrefix, ImageProcessor
from streamconv.families.base import ConversionSpec, Family
from streamconv.families.dinov2_geometry import (
    HEAD_PREFIX,
    REGISTER_KEYS,
    Dimensions,
    ffn_size,
    has_published_heads,
    heads_elsewhere,
    read_dimensions,
    reason_for_heads,
    with_config,
    with_heads,
)
from streamconv.families.dinov2_models import IMAGE_PROCESSOR, MODELS
from streamconv.families.dinov2_rules import HEAD_RULES, chunked_key, loaded_keys, rules, unchunked_key
from streamconv.families.dinov2_timm import assumptions, differences, heads_beside, image_processor_beside


def _problems(sizes: Dimensions, grid: int, mlp_ratio: int) -> list[str]:
    """Describe the sizes that transformers' classes do not have."""
    heads = sizes.num_heads
    return [
        problem
        for problem, is_wrong in (
            (f"tensors do not show the number of attention heads, and {heads_elsewhere(sizes.hidden)}: "
             "give the number with --num-heads", sizes.hidden and not heads),
            (f"hidden size {sizes.hidden} is not divisible by {heads} attention heads: give another number of heads "
             "with --num-heads", heads and sizes.hidden % heads),
            (f"no whole mlp_ratio gives feed-forward width {sizes.ffn} for hidden size {sizes.hidden}", not mlp_ratio),
            (f"pos_embed has {sizes.source_positions} positions, which are not a square grid{_tokens(sizes)}",
             not grid or grid * grid + 1 != sizes.positions),
            (f"pos_embed has {sizes.source_positions} positions, which may be those of patches alone, or of fewer "
             "patches, a CLS token and the registers", sizes.has_ambiguous_positions),
            ("there are no blocks", not sizes.layers),
            (f"the head reads {sizes.head_layers} layers, but transformers' classes read the last one only",
             sizes.head_layers > 1),
            (f"the head reads {sizes.hidden} channels, such as those of the CLS token alone, but transformers' classes "
             f"read {2 * sizes.hidden}: the CLS token and the mean of the patch tokens", not sizes.head_layers),
        )
        if is_wrong
    ]  # fmt: skip


def _tokens(sizes: Dimensions) -> str:
    """Describe the tokens whose position embeddings precede those of the patches."""
    if sizes.register_key == REGISTER_KEYS[1]:
        return f", nor one with a CLS token and {sizes.registers} registers"
    return " and a CLS token"


def _notes(sizes: Dimensions) -> list[str]:
    """Describe what is written for parts that the source does not have."""
    linear = {"attn.proj": sizes.has_proj_bias, "mlp": sizes.has_ffn_bias, "patch_embed.proj": sizes.has_patch_bias}
    unbiased = ", ".join(name for name, has_bias in linear.items() if not has_bias)
    return [
        note
        for note, is_so in (
            ("the source has no LayerScale: ones are written, which have no effect", not sizes.has_layer_scale),
            (f"the source has no bias in {unbiased}: zeros are written, which have no effect", unbiased),
            ("the source has no mask token: zeros are written", sizes.registers and not sizes.has_mask_token),
            (f"the source has timm's layout: {'; '.join(differences(sizes))}", sizes.is_timm),
        )
        if is_so
    ]  # fmt: skip


def conversion_spec(sizes: Dimensions) -> ConversionSpec:
    """Return the rules and the configuration for these sizes."""
    mlp_ratio = next((r for r in range(1, 17) if ffn_size(sizes.hidden, r, sizes.swiglu) == sizes.ffn), 0)
    grid = math.isqrt(max(0, sizes.positions - 1))
    is_classifier = sizes.classes is not None
    dims = {
        "D": sizes.hidden, "2D": 2 * sizes.hidden, "3D": 3 * sizes.hidden, "F": sizes.ffn, "2F": 2 * sizes.ffn,
        "N": sizes.positions, "S": sizes.source_positions, "R": sizes.registers, "C": sizes.channels, "P": sizes.patch,
        "K": sizes.classes or 0,
    }  # fmt: skip
    stages = ["stem", *(f"stage{i}" for i in range(1, sizes.layers + 1))]
    kind = "Dinov2WithRegisters" if sizes.registers else "Dinov2"
    prefix = "dinov2_with_registers" if sizes.registers else "dinov2"
    config: dict[str, Any] = {
        "model_type": prefix,
        "apply_layernorm": True,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": sizes.hidden,
        "image_size": grid * sizes.patch,
        "initializer_range": 0.02,
        "layer_norm_eps": sizes.epsilon,
        "layerscale_value": 1.0,
        "mlp_ratio": mlp_ratio,
        "num_attention_heads": sizes.num_heads,
        "num_channels": sizes.channels,
        "num_hidden_layers": sizes.layers,
        "out_features": stages[-1:],
        "out_indices": [sizes.layers],
        "patch_size": sizes.patch,
        "qkv_bias": sizes.has_qkv_bias,
        "reshape_hidden_states": True,
        "stage_names": stages,
        "use_swiglu_ffn": sizes.swiglu,
        **({"num_register_tokens": sizes.registers} if sizes.registers else {"use_mask_token": sizes.has_mask_token}),
    }
    return ConversionSpec(
        rules=rules(sizes, f"{prefix}." if is_classifier else "") + (HEAD_RULES if is_classifier else ()),
        dims=dims,
        counts={"i": sizes.layers},
        architecture=f"{kind}ForImageClassification" if is_classifier else f"{kind}Model",
        config=config,
        problems=tuple(_problems(sizes, grid, mlp_ratio)),
        notes=tuple(_notes(sizes)),
        unproved=assumptions(sizes),
    )


# DINO and iBOT train the backbone with a projection after it, in a student's or a teacher's checkpoint.
_TRAINING_HEAD = "a head for training only, which no transformers class has"
_OPTIMIZER = "optimizer state"
_TASK_HEAD = "a head for depth or segmentation, which no transformers class has"

_FREE_CONFIG_KEYS = frozenset(
    {"attention_probs_dropout_prob", "drop_path_rate", "hidden_dropout_prob", "initializer_range", "layerscale_value",
     "apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names"}
)  # fmt: skip

FAMILY = Family(
    name="dinov2",
    signature=frozenset({"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight"}),
    models=MODELS,
    read_dimensions=read_dimensions,
    conversion_spec=conversion_spec,
    organisation="facebook",
    pipeline_tags={
        "Dinov2Model": "image-feature-extraction",
        "Dinov2Backbone": "image-feature-extraction",
        "Dinov2ForImageClassification": "image-classification",
        "Dinov2WithRegistersModel": "image-feature-extraction",
        "Dinov2WithRegistersBackbone": "image-feature-extraction",
        "Dinov2WithRegistersForImageClassification": "image-classification",
    },
    free_config_keys=_FREE_CONFIG_KEYS,
    tensor_config_keys=frozenset({"use_mask_token"}),
    untensored_config_keys=frozenset({"hidden_act", "layer_norm_eps", "num_attention_heads"}),
    equal_architectures={
        "Dinov2Model": ("Dinov2Backbone",),
        "Dinov2WithRegistersModel": ("Dinov2WithRegistersBackbone",),
    },
    with_config=with_config,
    loaded_keys=loaded_keys,
    extra_prefixes=(
        ExtraPrefix("dino_head.", _TRAINING_HEAD),
        ExtraPrefix("ibot_head.", _TRAINING_HEAD),
        ExtraPrefix("optimizer.", _OPTIMIZER),
        ExtraPrefix("optimizer_state_dict.", _OPTIMIZER),
        ExtraPrefix("head.mlp.", _TRAINING_HEAD),  # of the original DINO
        ExtraPrefix("head.last_layer.", _TRAINING_HEAD),
        ExtraPrefix("decode_head.", _TASK_HEAD, is_skipped=False),
    ),
    classifier_head=ClassifierHead(
        HEAD_PREFIX,
        classes="K",
        imagenet_classes=1000,
        starts=frozenset({HEAD_PREFIX, "classifier.", "cls_head.", "fc.", "head.", "linear."}),
        reads="the CLS token and the mean of the patch tokens",
    ),
    image_processor=ImageProcessor(IMAGE_PROCESSOR, image_processor_beside),
    block_chunks=BlockChunks(unchunked_key, chunked_key),
    attention_heads=AttentionHeads(
        lambda sizes: sizes.num_heads,
        with_heads,
        has_published_heads,
        reason_for_heads,
        heads_beside,
        config_default=12,
    ),
)
