"""The rules from a DINOv3 vision transformer's keys to those in transformers' files.

In memory, transformers 5 has "model." before a layer's name; 4.x does not.
"""

from streamconv.families.dinov3_geometry import BLOCK, PERIODS, ROPE_BASE, Dimensions
from streamconv.families.operations import Chunk, Multiply, Omit
from streamconv.families.rules import Rule, chunk, convert, drop, fill, rename, reshape
from streamconv.tensors.concatenation import concat
from streamconv.tensors.constants import filled, literal
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import TensorInfo

LAYER = "layer.{i}."
_BIAS, _MASK = BLOCK + "attn.qkv.bias", BLOCK + "attn.qkv.bias_mask"


def rules(sizes: Dimensions) -> tuple[Rule, ...]:
    """Return the rules for every key of a backbone.

    Symbols: D hidden, F feed-forward width, R registers, C channels, P patch, Q a quarter of a head's channels.
    """
    registers, has_registers = "embeddings.register_tokens", sizes.registers or sizes.has_empty_registers
    norm = filled(1.0, _vector(sizes)), filled(0.0, _vector(sizes))
    reason = "only training uses it, for local crops"

    def bias(source: str, target: str, shape: str, is_there: bool) -> tuple[Rule, ...]:
        return (rename(f"{source}.bias", f"{target}.bias", shape),) if is_there else ()

    def scale(n: int) -> Rule:
        target = f"{LAYER}layer_scale{n}.lambda1"
        return rename(f"{BLOCK}ls{n}.gamma", target, "D") if sizes.has_layer_scale else fill(target, 1.0, "D")

    def norm_rules(source: str, target: str) -> tuple[Rule, ...]:
        is_whole = not sizes.has_rms_norm
        return rename(f"{source}.weight", f"{target}.weight", "D"), *bias(source, target, "D", is_whole)

    return (
        rename("cls_token", "embeddings.cls_token", "1 1 D"),
        rename("storage_tokens", registers, "1 R D") if has_registers else fill(registers, 0.0, "1 R D"),
        reshape("mask_token", "embeddings.mask_token", "1 D", "1 1 D"),
        rename("patch_embed.proj.weight", "embeddings.patch_embeddings.weight", "D C P P"),
        rename("patch_embed.proj.bias", "embeddings.patch_embeddings.bias", "D"),
        drop(PERIODS, "transformers computes them", "Q", restored=periods(sizes)),
        *norm_rules(BLOCK + "norm1", LAYER + "norm1"),
        chunk(BLOCK + "attn.qkv.weight", _projections("qkv", "weight"), "3D D"),
        *_bias_rules(sizes),
        rename(BLOCK + "attn.proj.weight", LAYER + "attention.o_proj.weight", "D D"),
        *bias(BLOCK + "attn.proj", LAYER + "attention.o_proj", "D", sizes.has_proj_bias),
        scale(1),
        *norm_rules(BLOCK + "norm2", LAYER + "norm2"),
        _feed_forward_rule(sizes),
        scale(2),
        *norm_rules("norm", "norm"),
        *((drop("cls_norm.weight", ""), drop("cls_norm.bias", "")) if sizes.has_cls_norm else ()),
        *(
            drop(f"local_cls_norm.{part}", reason, "D", restored=value)
            for part, value in zip(("weight", "bias"), norm, strict=True)
            if sizes.has_local_norm
        ),
    )


def _feed_forward_rule(sizes: Dimensions) -> Rule:
    """Return one rule for the whole layer, since the sources of up_proj and down_proj depend on the gate.

    They are w2 and w3 with a gate, which is w1, and fc1 and fc2 without.
    """
    inner = {"w1": "gate_proj", "w2": "up_proj"} if sizes.is_gated else {"fc1": "up_proj"}
    layers = {**inner, "w3" if sizes.is_gated else "fc2": "down_proj"}
    parts = ("weight", "bias") if sizes.has_ffn_bias else ("weight",)
    shapes = {"weight": "F D", "bias": "F"}, {"weight": "D F", "bias": "D"}
    return convert(
        tuple(f"{BLOCK}mlp.{layer}.{part}" for layer in layers for part in parts),
        tuple(f"{LAYER}mlp.{layer}.{part}" for layer in layers.values() for part in parts),
        tuple(shapes[layer == "down_proj"][part] for layer in layers.values() for part in parts),
    )


def _projections(letters: str, part: str) -> tuple[str, ...]:
    return tuple(f"{LAYER}attention.{letter}_proj.{part}" for letter in letters)


def _bias_rules(sizes: Dimensions) -> tuple[Rule, ...]:
    """Return the rules for the bias of queries, keys and values, and for the mask that it is multiplied by."""
    if not sizes.has_bias:
        return ()
    targets = _projections("qkv" if sizes.has_key_bias else "qv", "bias")
    without_keys = () if sizes.has_key_bias else (Omit(1, "the model multiplies it by a mask, which is 0"),)
    if not sizes.mask:
        return (convert(_BIAS, targets, "3D", Chunk(3), *without_keys),)
    if sizes.mask == "mixed":
        return (convert((_BIAS, _MASK), targets, ("3D", "3D"), Multiply(), Chunk(3), *without_keys),)
    one, zero = filled(1.0, _vector(sizes)), filled(0.0, _vector(sizes))
    mask = concat([one, zero, one])  # as the authors' code initializes it
    if sizes.mask == "zero":
        return (
            *(fill(target, 0.0, "D") for target in targets),
            drop(_BIAS, "the model multiplies it by a mask, which is 0", "3D", restored=concat([zero] * 3)),
            drop(_MASK, "it is 0, and so are the biases that it is multiplied by", "3D", restored=mask),
        )
    return (
        convert(_BIAS, targets, "3D", Chunk(3), *without_keys),
        drop(_MASK, "it only removes the bias of keys", "3D", restored=mask),
    )


def _vector(sizes: Dimensions) -> TensorInfo:
    return TensorInfo("F32", (sizes.hidden,))


def periods(sizes: Dimensions) -> Expression | None:
    """Return RoPE's periods in bfloat16, as in the published files; None if the number of heads is not known."""
    count = sizes.hidden // (4 * sizes.num_heads) if sizes.num_heads else 0
    if not count:
        return None
    return literal([ROPE_BASE ** (i / count) for i in range(count)], "BF16", (count,))


def loaded_keys(target: str) -> tuple[str, ...]:
    """Return the name that ``target`` has in memory, in transformers 5."""
    return (f"model.{target}" if target.startswith("layer.") else target,)
