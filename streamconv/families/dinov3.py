"""DINOv3's vision transformers (Siméoni et al. 2025, https://github.com/facebookresearch/dinov3) to DINOv3ViTModel."""

from typing import Any

from streamconv.families.aspects import AttentionHeads, DecidingValues
from streamconv.families.base import ConversionSpec, Family
from streamconv.families.dinov3_geometry import (
    PERIODS,
    ROPE_BASE,
    Dimensions,
    has_published_heads,
    is_deciding,
    read_dimensions,
    reason_for_heads,
    summarise,
    with_config,
    with_heads,
    with_summaries,
)
from streamconv.families.dinov3_models import MODELS
from streamconv.families.dinov3_release import EXTRA_PREFIXES, IMAGE_PROCESSOR, ORGANISATION
from streamconv.families.dinov3_rules import loaded_keys, rules


def conversion_spec(sizes: Dimensions) -> ConversionSpec:
    """Return the rules and the configuration for these sizes."""
    heads = sizes.num_heads
    stages = ["stem", *(f"stage{i}" for i in range(1, sizes.layers + 1))]
    dims = {
        "D": sizes.hidden, "3D": 3 * sizes.hidden, "F": sizes.ffn, "R": sizes.registers, "C": sizes.channels,
        "P": sizes.patch, "Q": sizes.hidden // (4 * heads) if heads else 0,
    }  # fmt: skip
    config: dict[str, Any] = {
        "model_type": "dinov3_vit",
        "apply_layernorm": True,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "silu" if sizes.is_gated else "gelu",
        "hidden_size": sizes.hidden,
        "image_size": 224,
        "initializer_range": 0.02,
        "intermediate_size": sizes.ffn,
        "key_bias": sizes.has_key_bias,
        "layer_norm_eps": sizes.epsilon,
        "layerscale_value": 1.0,
        "mlp_bias": sizes.has_ffn_bias,
        "num_attention_heads": heads,
        "num_channels": sizes.channels,
        "num_hidden_layers": sizes.layers,
        "num_register_tokens": sizes.registers,
        "out_features": stages[-1:],
        "out_indices": [sizes.layers],
        "patch_size": sizes.patch,
        "pos_embed_jitter": None,
        "pos_embed_rescale": 2.0,
        "pos_embed_shift": None,
        "proj_bias": sizes.has_proj_bias,
        "query_bias": sizes.has_bias,
        "reshape_hidden_states": True,
        "rope_theta": ROPE_BASE,
        "stage_names": stages,
        "use_gated_mlp": sizes.is_gated,
        "value_bias": sizes.has_bias,
    }
    return ConversionSpec(
        rules=rules(sizes),
        dims=dims,
        counts={"i": sizes.layers},
        architecture="DINOv3ViTModel",
        config=config,
        problems=tuple(_problems(sizes)),
        notes=tuple(_notes(sizes)),
        unproved=() if _is_published(sizes) or sizes.has_epsilon else (_assumption(sizes),),
    )


def _problems(sizes: Dimensions) -> list[str]:
    heads = sizes.num_heads
    return [
        problem
        for problem, is_wrong in (
            ("the file does not show the number of attention heads: give the number with --num-heads",
             sizes.hidden and not heads),
            (f"{PERIODS} shows {sizes.head_size} channels in a head, so there are not {heads} attention heads: omit "
             "--num-heads", sizes.is_original and sizes.heads),
            (f"hidden size {sizes.hidden} cannot be divided into {heads} attention heads of a multiple of 4 channels",
             heads and sizes.hidden % (4 * heads)),
            (f"{PERIODS} are not {ROPE_BASE:g} ** (i / n), the periods that transformers computes: the model was "
             "trained with another base, or with a minimum and a maximum period, or they are not floating-point "
             "numbers of at least 16 bits", sizes.periods == "others"),
            ("attn.qkv.bias or its bias_mask holds NaN or infinity: the authors' code did not initialize the mask, "
             "so the biases of the model are not known. If training used 1 for queries and values and 0 for keys, set "
             "the masks to that", sizes.mask == "nan"),
            ("attn.qkv.bias_mask is missing in some blocks, or does not hold floating-point numbers of at least 16 "
             "bits, so the biases of the model are not known", sizes.mask == "missing"),
            ("it has a norm of its own for the CLS token (cls_norm, untie_cls_and_patch_norms), which transformers' "
             "class does not have", sizes.has_cls_norm),
            ("its norms have no bias (RMSNorm), and those of transformers' class are layer norms", sizes.has_rms_norm),
            ("there are no blocks", not sizes.layers),
        )
        if is_wrong
    ]  # fmt: skip


def _is_published(sizes: Dimensions) -> bool:
    return any(sizes == model.dimensions for model in MODELS)


def _assumption(sizes: Dimensions) -> str:
    return (
        f"the layer norms' epsilon is assumed to be {sizes.epsilon:g}, and coordinates of patches to be normalized for "
        "each side of an image, as in the authors' configurations: tensors do not show them"
    )


def _notes(sizes: Dimensions) -> list[str]:
    return [
        note
        for note, is_so in (
            (_assumption(sizes), _is_published(sizes) and not sizes.has_epsilon),
            ("the source has no LayerScale: ones are written, which have no effect", not sizes.has_layer_scale),
            ("the biases of queries and values are 0, because their masks are", sizes.mask == "zero"),
            ("the biases of queries, keys and values are multiplied by their masks", sizes.mask == "mixed"),
        )
        if is_so
    ]  # fmt: skip


FAMILY = Family(
    name="dinov3",
    signature=frozenset(
        {"cls_token", "storage_tokens", "mask_token", "rope_embed.periods", "patch_embed.proj.weight",
         "blocks.0.norm1.weight", "norm.weight"}
    ),
    models=MODELS,
    read_dimensions=read_dimensions,
    conversion_spec=conversion_spec,
    organisation=ORGANISATION,
    pipeline_tags={"DINOv3ViTModel": "image-feature-extraction", "DINOv3ViTBackbone": "image-feature-extraction"},
    free_config_keys=frozenset(
        {"attention_dropout", "drop_path_rate", "initializer_range", "layerscale_value", "apply_layernorm",
         "image_size", "out_features", "out_indices", "pos_embed_jitter", "pos_embed_rescale", "pos_embed_shift",
         "reshape_hidden_states", "stage_names"}
    ),
    untensored_config_keys=frozenset({"hidden_act", "layer_norm_eps", "num_attention_heads", "rope_theta"}),
    equal_architectures={"DINOv3ViTModel": ("DINOv3ViTBackbone",)},
    with_config=with_config,
    reverted_with_config=with_config,
    loaded_keys=loaded_keys,
    variants=(
        Dimensions(64, 1, 256, has_key_bias=True, mask=""),
        Dimensions(64, 1, 256, is_gated=True, has_ffn_bias=False),
        Dimensions(64, 1, 256, has_ffn_bias=False, has_layer_scale=False),
        Dimensions(64, 1, 256, mask="mixed"),
        Dimensions(64, 1, 256, mask="mixed", has_key_bias=True),
    ),
    extra_prefixes=EXTRA_PREFIXES,
    image_processor=IMAGE_PROCESSOR,
    attention_heads=AttentionHeads(
        lambda sizes: sizes.num_heads,
        with_heads,
        has_published_heads,
        reason_for_heads,
        config_default=6,
        are_shown=lambda sizes: sizes.is_original,
    ),
    deciding_values=DecidingValues(is_deciding, summarise, with_summaries),
)  # fmt: skip
