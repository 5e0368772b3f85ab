"""The rules for DINOv2's tensors, and the spellings of their names.

The names on the right are those in transformers' files, which 4.x and 5.x both write and read;
5.x has other names for some of them in memory.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.families.dinov2_geometry import BLOCK, HEAD_PREFIX, Dimensions
from streamconv.families.operations import Dims, NoInverseError, Operation, Prepend
from streamconv.families.rules import Rule, chunk, convert, drop, fill, rename
from streamconv.tensors.computed import add
from streamconv.tensors.concatenation import concat
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import TensorInfo

LAYER = "encoder.layer.{i}."


def rules(sizes: Dimensions, prefix: str) -> tuple[Rule, ...]:
    """Return the rules for every key of a backbone.

    Symbols: D hidden, F feed-forward width, N positions, S positions in the source, R registers, C channels, P patch.
    """
    to, layer = prefix, prefix + LAYER
    scale1, scale2 = (layer + f"layer_scale{n}.lambda1" for n in (1, 2))
    mask_token = to + "embeddings.mask_token"

    # transformers' classes always have these biases and a LayerScale, and the one with registers has a mask token.
    def bias(source: str, target: str, shape: str, is_there: bool) -> Rule:
        return rename(source, target, shape) if is_there else fill(target, 0.0, shape)

    has_bias = sizes.has_ffn_bias
    # In all of them, the first half of the first layer is the gate.
    first, second = (BLOCK + f"mlp.{name}." for name in (("fc1", "fc2") if sizes.is_packed else ("w12", "w3")))
    feed_forward = (
        rename(first + "weight", layer + "mlp.weights_in.weight", "2F D"),
        bias(first + "bias", layer + "mlp.weights_in.bias", "2F", has_bias),
        rename(second + "weight", layer + "mlp.weights_out.weight", "D F"),
        bias(second + "bias", layer + "mlp.weights_out.bias", "D", has_bias),
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

    def query_key_value(part: str) -> tuple[str, ...]:
        return tuple(f"{layer}attention.attention.{name}.{part}" for name in ("query", "key", "value"))

    return (
        rename("cls_token", to + "embeddings.cls_token", "1 1 D"),
        *_embeddings(sizes, to + "embeddings.position_embeddings", to + "embeddings.register_tokens"),
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


def _embeddings(sizes: Dimensions, positions: str, registers: str) -> tuple[Rule, ...]:
    """Return the rules for the position embeddings and the registers, whose targets have these names."""
    key = sizes.register_key
    if sizes.embedded_tokens > 1:
        return (convert(("pos_embed", key), (positions, registers), ("1 S D", "1 R D"), EmbedRegisters()),)
    zeros = () if sizes.embedded_tokens else (Prepend(0.0, rows=1, dim=1),)  # timm adds it to cls_token
    rule = convert("pos_embed", positions, "1 S D", *zeros)
    if sizes.has_empty_registers:
        return rule, drop(key, "it is empty: the model has no registers", "1 R D")
    return (rule, rename(key, registers, "1 R D")) if sizes.registers else (rule,)


@dataclass(frozen=True, slots=True)
class EmbedRegisters(Operation):
    """Adds to the registers their position embeddings, as timm does whenever the model runs.

    Its inputs are the position embeddings of the CLS token, the registers and the patches, and the registers. Its
    results are the position embeddings without those of the registers, and the sums.
    """

    rounds = True

    def apply(self, tensors: Sequence[Expression], dims: Dims) -> list[Expression]:
        positions, registers = tensors
        own = registers.shape[1]
        cls, added, patches = positions.split([1, own, positions.shape[1] - 1 - own], dim=1)
        return [concat([cls, patches], dim=1), add(registers, added)]

    def undo(self, tensors: Sequence[Expression], inputs: Sequence[TensorInfo] | None) -> list[Expression]:
        raise NoInverseError("the terms of a sum cannot be recovered")


# A linear head reads the CLS token beside the mean of the patch tokens, hence 2D; K classes.
HEAD_RULES = (
    rename(HEAD_PREFIX + "weight", "classifier.weight", "K 2D"),
    rename(HEAD_PREFIX + "bias", "classifier.bias", "K"),
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
