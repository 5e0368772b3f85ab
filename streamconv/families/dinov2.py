"""DINOv2 (Oquab et al. 2023, https://github.com/facebookresearch/dinov2) to transformers' Dinov2Model.

With registers (Darcet et al. 2024) it is Dinov2WithRegistersModel, whose own default is another patch size.

The names on the right are those of transformers' files, which 4.x and 5.x both write and read;
5.x calls some of them otherwise in memory.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamconv.families import HEAD_PREFIX, Family, Layout, Model, RemoteFile
from streamconv.mapping import Rule, chunk, count_of, rename
from streamconv.tensors import TensorInfo

HEAD_SIZE = 64  # channels per attention head, in every model of the family
BLOCK = "blocks.{i}."
LAYER = "encoder.layer.{i}."


@dataclass(frozen=True)
class Geometry:
    """Sizes that a checkpoint's shapes give. ``ffn`` is the width inside the feed-forward layer."""

    hidden: int
    layers: int
    ffn: int
    swiglu: bool = False
    patch: int = 14
    channels: int = 3
    positions: int = 37 * 37 + 1
    registers: int = 0
    classes: int | None = None


def ffn_size(hidden: int, mlp_ratio: int, swiglu: bool) -> int:
    """SwiGLU keeps two thirds of the MLP's width, rounded up to a multiple of 8 (Meta's swiglu_ffn.py)."""
    return (int(hidden * mlp_ratio * 2 / 3) + 7) // 8 * 8 if swiglu else hidden * mlp_ratio


def geometry(infos: Mapping[str, TensorInfo]) -> Geometry:
    """Sizes from shapes; a tensor that is missing or misshaped counts as what the others make likely."""

    def size(key: str, axis: int, ndim: int, default: int) -> int:
        shape = infos[key].shape if key in infos else ()
        return shape[axis] if len(shape) == ndim else default

    hidden = size("cls_token", 2, 3, size("norm.weight", 0, 1, 0))
    swiglu = "blocks.0.mlp.w12.weight" in infos
    ffn = size("blocks.0.mlp.w3.weight", 1, 2, 0) if swiglu else size("blocks.0.mlp.fc1.weight", 0, 2, 0)
    return Geometry(
        hidden=hidden,
        layers=count_of(BLOCK + "norm1.weight", infos),
        ffn=ffn or ffn_size(hidden, 4, swiglu),
        swiglu=swiglu,
        patch=size("patch_embed.proj.weight", 3, 4, 14),
        channels=size("patch_embed.proj.weight", 1, 4, 3),
        positions=size("pos_embed", 1, 3, 37 * 37 + 1),
        registers=size("register_tokens", 1, 3, 4) if "register_tokens" in infos else 0,
        classes=size(HEAD_PREFIX + "weight", 0, 2, 1000) if HEAD_PREFIX + "weight" in infos else None,
    )


def rules(swiglu: bool, registers: bool, prefix: str) -> tuple[Rule, ...]:
    """Every key of a checkpoint.

    Symbols: D hidden, F feed-forward width, N positions, R registers, C channels, P patch.
    """
    to, layer = prefix, prefix + LAYER
    feed_forward = (
        rename(BLOCK + "mlp.w12.weight", layer + "mlp.weights_in.weight", "2F D"),
        rename(BLOCK + "mlp.w12.bias", layer + "mlp.weights_in.bias", "2F"),
        rename(BLOCK + "mlp.w3.weight", layer + "mlp.weights_out.weight", "D F"),
        rename(BLOCK + "mlp.w3.bias", layer + "mlp.weights_out.bias", "D"),
    ) if swiglu else (
        rename(BLOCK + "mlp.fc1.weight", layer + "mlp.fc1.weight", "F D"),
        rename(BLOCK + "mlp.fc1.bias", layer + "mlp.fc1.bias", "F"),
        rename(BLOCK + "mlp.fc2.weight", layer + "mlp.fc2.weight", "D F"),
        rename(BLOCK + "mlp.fc2.bias", layer + "mlp.fc2.bias", "D"),
    )  # fmt: skip

    def query_key_value(part: str) -> tuple[str, ...]:
        return tuple(f"{layer}attention.attention.{name}.{part}" for name in ("query", "key", "value"))

    return (
        rename("cls_token", to + "embeddings.cls_token", "1 1 D"),
        rename("pos_embed", to + "embeddings.position_embeddings", "1 N D"),
        *((rename("register_tokens", to + "embeddings.register_tokens", "1 R D"),) if registers else ()),
        rename("mask_token", to + "embeddings.mask_token", "1 D"),
        rename("patch_embed.proj.weight", to + "embeddings.patch_embeddings.projection.weight", "D C P P"),
        rename("patch_embed.proj.bias", to + "embeddings.patch_embeddings.projection.bias", "D"),
        rename(BLOCK + "norm1.weight", layer + "norm1.weight", "D"),
        rename(BLOCK + "norm1.bias", layer + "norm1.bias", "D"),
        chunk(BLOCK + "attn.qkv.weight", query_key_value("weight"), "3D D"),
        chunk(BLOCK + "attn.qkv.bias", query_key_value("bias"), "3D"),
        rename(BLOCK + "attn.proj.weight", layer + "attention.output.dense.weight", "D D"),
        rename(BLOCK + "attn.proj.bias", layer + "attention.output.dense.bias", "D"),
        rename(BLOCK + "ls1.gamma", layer + "layer_scale1.lambda1", "D"),
        rename(BLOCK + "norm2.weight", layer + "norm2.weight", "D"),
        rename(BLOCK + "norm2.bias", layer + "norm2.bias", "D"),
        *feed_forward,
        rename(BLOCK + "ls2.gamma", layer + "layer_scale2.lambda1", "D"),
        rename("norm.weight", to + "layernorm.weight", "D"),
        rename("norm.bias", to + "layernorm.bias", "D"),
    )


# A linear head reads the CLS token beside the mean of the patch tokens, hence 2D; K classes.
HEAD_RULES = (
    rename(HEAD_PREFIX + "weight", "classifier.weight", "K 2D"),
    rename(HEAD_PREFIX + "bias", "classifier.bias", "K"),
)


def layout(sizes: Geometry) -> Layout:
    """Rules and configuration of these sizes."""
    mlp_ratio = next((r for r in range(1, 17) if ffn_size(sizes.hidden, r, sizes.swiglu) == sizes.ffn), 0)
    grid = math.isqrt(max(0, sizes.positions - 1))
    problems = [
        problem
        for problem, is_wrong in (
            (f"hidden size {sizes.hidden} is no multiple of {HEAD_SIZE}, the size of a head", sizes.hidden % HEAD_SIZE),
            (f"feed-forward width {sizes.ffn} is no whole mlp_ratio of hidden size {sizes.hidden}", not mlp_ratio),
            (f"pos_embed has {sizes.positions} positions, which are no square grid and a CLS token",
             not grid or grid * grid + 1 != sizes.positions),
            ("there are no blocks", not sizes.layers),
            (f"patch_embed takes {sizes.channels} channels, and the image processor gives 3", sizes.channels != 3),
        )
        if is_wrong
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
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "mlp_ratio": mlp_ratio,
        "num_attention_heads": sizes.hidden // HEAD_SIZE,
        "num_channels": sizes.channels,
        "num_hidden_layers": sizes.layers,
        "out_features": stages[-1:],
        "out_indices": [sizes.layers],
        "patch_size": sizes.patch,
        "qkv_bias": True,
        "reshape_hidden_states": True,
        "stage_names": stages,
        "use_swiglu_ffn": sizes.swiglu,
        # The class with registers always has a mask token.
        **({"num_register_tokens": sizes.registers} if sizes.registers else {"use_mask_token": True}),
    }
    return Layout(
        rules=rules(sizes.swiglu, bool(sizes.registers), f"{prefix}." if is_classifier else "")
        + (HEAD_RULES if is_classifier else ()),
        dims=dims,
        count=sizes.layers,
        architecture=f"{kind}ForImageClassification" if is_classifier else f"{kind}Model",
        config=config,
        problems=tuple(problems),
    )


_IN_MEMORY = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.weights_in": "mlp.gate_proj",
    "mlp.weights_out": "mlp.down_proj",
}


def in_memory_name(target: str) -> str:
    """What transformers 5 calls ``target`` once loaded; of the two halves of weights_in, the first."""
    return re.sub("|".join(map(re.escape, _IN_MEMORY)), lambda match: _IN_MEMORY[match[0]], target)


# As published, although the models' own image size is 518.
IMAGE_PROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
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
    "size": {"shortest_edge": 256},
}


def _models() -> tuple[Model, ...]:
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
            sizes = Geometry(hidden, layers, ffn_size(hidden, 4, swiglu), swiglu, registers=registers)
            backbone, head = (
                RemoteFile(each, address + each) for each in (f"{file}_pretrain.pth", f"{file}_linear_head.pth")
            )
            classifier = replace(sizes, classes=1000)
            models += [
                Model(name, published, sizes, backbone),
                Model(f"{name}_1layer", f"{published}-imagenet1k-1-layer", classifier, backbone, head),
            ]
    return tuple(sorted(models, key=lambda model: (model.geometry.registers, model.head is not None)))


FAMILY = Family(
    name="dinov2",
    signature=frozenset({"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight"}),
    models=_models(),
    geometry=geometry,
    layout=layout,
    image_processor=IMAGE_PROCESSOR,
    in_memory_name=in_memory_name,
    organisation="facebook",
    licence="apache-2.0",
    pipeline_tags={
        "Dinov2Model": "image-feature-extraction",
        "Dinov2ForImageClassification": "image-classification",
        "Dinov2WithRegistersModel": "image-feature-extraction",
        "Dinov2WithRegistersForImageClassification": "image-classification",
    },
)
