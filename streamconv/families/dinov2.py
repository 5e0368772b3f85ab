"""DINOv2 (Oquab et al. 2023, https://github.com/facebookresearch/dinov2) to transformers' Dinov2Model.

With registers (Darcet et al. 2024) it is Dinov2WithRegistersModel, whose own default is another patch size.
Web-DINO (Fan et al. 2025, https://github.com/facebookresearch/webssl) is the same architecture, up to 7B.

The names on the right are those in transformers' files, which 4.x and 5.x both write and read;
5.x has other names for some of them in memory.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from streamconv.families.base import (
    AttentionHeads,
    BlockChunks,
    ClassifierHead,
    ConversionSpec,
    ExtraPrefix,
    Family,
    ImageProcessor,
    Model,
    RemoteFile,
)
from streamconv.families.dinov2_geometry import (
    BLOCK,
    HEAD_PREFIX,
    Dimensions,
    ffn_size,
    has_published_heads,
    heads_beside,
    heads_elsewhere,
    read_dimensions,
    reason_for_heads,
    with_config,
    with_heads,
)
from streamconv.families.rules import Rule, chunk, drop, fill, rename

LAYER = "encoder.layer.{i}."


def rules(sizes: Dimensions, prefix: str) -> tuple[Rule, ...]:
    """Return the rules for every key of a backbone.

    Symbols: D hidden, F feed-forward width, N positions, R registers, C channels, P patch.
    """
    to, layer = prefix, prefix + LAYER
    scale1, scale2 = (layer + f"layer_scale{n}.lambda1" for n in (1, 2))
    mask_token = to + "embeddings.mask_token"

    # transformers' classes always have these biases and a LayerScale, and the one with registers has a mask token.
    def bias(source: str, target: str, shape: str, is_there: bool) -> Rule:
        return rename(source, target, shape) if is_there else fill(target, 0.0, shape)

    has_bias = sizes.has_ffn_bias
    feed_forward = (
        rename(BLOCK + "mlp.w12.weight", layer + "mlp.weights_in.weight", "2F D"),
        bias(BLOCK + "mlp.w12.bias", layer + "mlp.weights_in.bias", "2F", has_bias),
        rename(BLOCK + "mlp.w3.weight", layer + "mlp.weights_out.weight", "D F"),
        bias(BLOCK + "mlp.w3.bias", layer + "mlp.weights_out.bias", "D", has_bias),
    ) if sizes.swiglu else (
        rename(BLOCK + "mlp.fc1.weight", layer + "mlp.fc1.weight", "F D"),
        bias(BLOCK + "mlp.fc1.bias", layer + "mlp.fc1.bias", "F", has_bias),
        rename(BLOCK + "mlp.fc2.weight", layer + "mlp.fc2.weight", "D F"),
        bias(BLOCK + "mlp.fc2.bias", layer + "mlp.fc2.bias", "D", has_bias),
    )  # fmt: skip
    layer_scale = (
        rename(BLOCK + "ls1.gamma", scale1, "D"),
        rename(BLOCK + "ls2.gamma", scale2, "D"),
    ) if sizes.has_layer_scale else (fill(scale1, 1.0, "D"), fill(scale2, 1.0, "D"))  # fmt: skip
    mask = (rename(sizes.mask_key, mask_token, "1 D"),) if sizes.has_mask_token else ()
    if sizes.registers and not sizes.has_mask_token:
        mask = (fill(mask_token, 0.0, "1 D"),)
    registers = (rename("register_tokens", to + "embeddings.register_tokens", "1 R D"),) if sizes.registers else ()
    if sizes.has_empty_registers:
        registers = (drop("register_tokens", "it is empty: the model has no registers", "1 R D"),)

    def query_key_value(part: str) -> tuple[str, ...]:
        return tuple(f"{layer}attention.attention.{name}.{part}" for name in ("query", "key", "value"))

    return (
        rename("cls_token", to + "embeddings.cls_token", "1 1 D"),
        rename("pos_embed", to + "embeddings.position_embeddings", "1 N D"),
        *registers,
        *mask,
        rename("patch_embed.proj.weight", to + "embeddings.patch_embeddings.projection.weight", "D C P P"),
        bias("patch_embed.proj.bias", to + "embeddings.patch_embeddings.projection.bias", "D", sizes.has_patch_bias),
        rename(BLOCK + "norm1.weight", layer + "norm1.weight", "D"),
        rename(BLOCK + "norm1.bias", layer + "norm1.bias", "D"),
        chunk(BLOCK + "attn.qkv.weight", query_key_value("weight"), "3D D"),
        *((chunk(BLOCK + "attn.qkv.bias", query_key_value("bias"), "3D"),) if sizes.has_qkv_bias else ()),
        rename(BLOCK + "attn.proj.weight", layer + "attention.output.dense.weight", "D D"),
        bias(BLOCK + "attn.proj.bias", layer + "attention.output.dense.bias", "D", sizes.has_proj_bias),
        layer_scale[0],
        rename(BLOCK + "norm2.weight", layer + "norm2.weight", "D"),
        rename(BLOCK + "norm2.bias", layer + "norm2.bias", "D"),
        *feed_forward,
        layer_scale[1],
        rename("norm.weight", to + "layernorm.weight", "D"),
        rename("norm.bias", to + "layernorm.bias", "D"),
    )


# A linear head reads the CLS token beside the mean of the patch tokens, hence 2D; K classes.
HEAD_RULES = (
    rename(HEAD_PREFIX + "weight", "classifier.weight", "K 2D"),
    rename(HEAD_PREFIX + "bias", "classifier.bias", "K"),
)


def conversion_spec(sizes: Dimensions) -> ConversionSpec:
    """Return the rules and the configuration for these sizes."""
    mlp_ratio = next((r for r in range(1, 17) if ffn_size(sizes.hidden, r, sizes.swiglu) == sizes.ffn), 0)
    grid = math.isqrt(max(0, sizes.positions - 1))
    heads = sizes.num_heads
    problems = [
        problem
        for problem, is_wrong in (
            (f"tensors do not show the number of attention heads, and {heads_elsewhere(sizes.hidden)}: "
             "give the number with --num-heads", sizes.hidden and not heads),
            (f"hidden size {sizes.hidden} is not divisible by {heads} attention heads: give another number of heads "
             "with --num-heads", heads and sizes.hidden % heads),
            (f"no whole mlp_ratio gives feed-forward width {sizes.ffn} for hidden size {sizes.hidden}", not mlp_ratio),
            (f"pos_embed has {sizes.positions} positions, which are not a square grid and a CLS token",
             not grid or grid * grid + 1 != sizes.positions),
            ("there are no blocks", not sizes.layers),
            (f"the head reads {sizes.head_layers} layers, but transformers' classes read the last one only",
             sizes.head_layers > 1),
            (f"the head reads {sizes.hidden} channels, such as those of the CLS token alone, but transformers' classes "
             f"read {2 * sizes.hidden}: the CLS token and the mean of the patch tokens", not sizes.head_layers),
        )
        if is_wrong
    ]  # fmt: skip
    linear = {"attn.proj": sizes.has_proj_bias, "mlp": sizes.has_ffn_bias, "patch_embed.proj": sizes.has_patch_bias}
    unbiased = ", ".join(name for name, has_bias in linear.items() if not has_bias)
    notes = [
        note
        for note, is_so in (
            ("the source has no LayerScale: ones are written, which have no effect", not sizes.has_layer_scale),
            (f"the source has no bias in {unbiased}: zeros are written, which have no effect", unbiased),
            ("the source has no mask token: zeros are written", sizes.registers and not sizes.has_mask_token),
        )
        if is_so
    ]  # fmt: skip
    is_classifier = sizes.classes is not None
    dims = {
        "D": sizes.hidden, "2D": 2 * sizes.hidden, "3D": 3 * sizes.hidden, "F": sizes.ffn, "2F": 2 * sizes.ffn,
        "N": sizes.positions, "R": sizes.registers, "C": sizes.channels, "P": sizes.patch, "K": sizes.classes or 0,
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
        "num_attention_heads": heads,
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
        count=sizes.layers,
        architecture=f"{kind}ForImageClassification" if is_classifier else f"{kind}Model",
        config=config,
        problems=tuple(problems),
        notes=tuple(notes),
    )


_LOADED_NAMES = {
    "attention.attention.query": ("attention.q_proj",),
    "attention.attention.key": ("attention.k_proj",),
    "attention.attention.value": ("attention.v_proj",),
    "attention.output.dense": ("attention.o_proj",),
    "mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.weights_out": ("mlp.down_proj",),
}
_LOADED = re.compile("|".join(map(re.escape, _LOADED_NAMES)))


def loaded_keys(target: str) -> tuple[str, ...]:
    """Return the names of the parts that ``target`` has in memory, in transformers 5, cut along dim 0."""
    found = _LOADED.search(target)
    return tuple(target.replace(found[0], name) for name in _LOADED_NAMES[found[0]]) if found else (target,)


def unchunked_key(key: str) -> str:
    """Return ``blocks.{chunk}.{i}.…`` without the chunk, which adds nothing: ``i`` counts through all chunks."""
    return re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", key)


def chunked_key(key: str, layers: int, chunks: int) -> str:
    """Return the key that DinoVisionTransformer has with ``block_chunks`` (Meta's vision_transformer.py)."""
    block = re.match(r"blocks\.(\d+)\.", key)
    return f"blocks.{int(block[1]) // max(1, layers // chunks)}.{key[7:]}" if block else key


def image_processor(resized: int, size: int) -> dict[str, Any]:
    """Return a config that resizes the shorter side to ``resized`` pixels, and crops to ``size`` by ``size``."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": resized},
    }


IMAGE_PROCESSOR = image_processor(256, 224)  # as published, although the models' own image size is 518


def _dinov2() -> tuple[Model, ...]:
    models = []
    for letter, word, hidden, layers, swiglu in (
        ("s", "small", 384, 12, False),
        ("b", "base", 768, 12, False),
        ("l", "large", 1024, 24, False),
        ("g", "giant", 1536, 40, True),
    ):
        plain = f"dinov2_vit{letter}14"
        address = f"https://dl.fbaipublicfiles.com/dinov2/{plain}/"  # of the files with registers, too
        for name, file, published, registers in (
            (plain, plain, f"dinov2-{word}", 0),
            (f"{plain}_reg", f"{plain}_reg4", f"dinov2-with-registers-{word}", 4),
        ):
            sizes = Dimensions(hidden, layers, ffn_size(hidden, 4, swiglu), swiglu, registers=registers)
            backbone, head = (
                RemoteFile(each, address + each) for each in (f"{file}_pretrain.pth", f"{file}_linear_head.pth")
            )
            classifier = replace(sizes, classes=1000)
            classifier_name = f"{published}-imagenet1k-1-layer"
            models += [
                Model(name, published, sizes, "apache-2.0", backbone, IMAGE_PROCESSOR),
                Model(f"{name}_1layer", classifier_name, classifier, "apache-2.0", backbone, IMAGE_PROCESSOR, head),
            ]
    return tuple(sorted(models, key=lambda model: (model.dimensions.registers, model.head is not None)))


def _web_dino() -> Iterator[Model]:
    for size, data, hidden, layers in (
        ("300m", "full2b", 1024, 24),
        ("1b", "full2b", 1536, 40),
        ("2b", "full2b", 2688, 24),
        ("2b", "light2b", 2688, 24),
        ("2b", "heavy2b", 2688, 24),
        ("3b", "full2b", 3072, 26),
        ("3b", "light2b", 3072, 26),
        ("3b", "heavy2b", 3072, 26),
        ("5b", "full2b", 3584, 32),
        ("7b", "full8b", 4096, 32),
    ):
        for pixels in (224, 378, 518) if size == "7b" else (224,):
            name = f"webssl_dino{size}_{data}_{pixels}"
            yield Model(
                name,
                name.replace("_", "-"),
                Dimensions(hidden, layers, ffn_size(hidden, 4, True), True, positions=(pixels // 14) ** 2 + 1),
                "cc-by-nc-4.0",
                RemoteFile(f"{name}.pth", f"https://dl.fbaipublicfiles.com/webssl/{name}.pth"),
                image_processor(pixels, pixels),
                block_chunks=4,
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
    models=(*_dinov2(), *_web_dino()),
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
    image_processor=ImageProcessor(IMAGE_PROCESSOR),
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
