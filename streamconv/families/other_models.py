"""Names checkpoints that fit no family: other architectures, and weights that are not stored as whole tensors.

A kind of checkpoint is recognised by marks. A mark is fragments of names, separated by spaces: all of them must occur,
and none that starts with "!" may. A fragment is whole parts of a name, and {i} is a number: "blocks.{i}.ls1" occurs in
"model.blocks.3.ls1.gamma". One mark is enough. No mark occurs in a checkpoint that can be converted, and no two
architectures have the same mark, so the order of the kinds decides nothing.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from streamconv.display import printable
from streamconv.errors import MappingError
from streamconv.families.registry import all_families
from streamconv.formats.foreign.advice import merge_zero

Shape = tuple[int, ...]
MAX_SEARCHED_LENGTH = 300  # no known model has longer names, and a hostile file may have thousands


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint. ``what`` is the rest of a sentence about a file, and ``advice`` says what to do with it."""

    what: str
    marks: tuple[str, ...] = ()
    advice: str = ""


ARCHITECTURES = (
    Kind("looks like a DINOv3 model in timm's names", ("reg_token blocks.{i}.gamma_1 !pos_embed",)),
    Kind(
        "is an MAE with its decoder", ("decoder_blocks.{i} decoder_embed", "decoder.decoder_embed"),
        "In its authors' names, the encoder can be converted: save it without the decoder's tensors and mask_token.",
    ),
    Kind(
        "looks like a BEiT or EVA model",
        ("cls_token blocks.{i}.attn.q_bias", "cls_token blocks.{i}.attn.relative_position_bias_table",
         "cls_token blocks.{i}.attn.q_proj", "cls_token blocks.{i}.gamma_1 !reg_token !blocks_token_only",
         "cls_token encoder.layer.{i}.lambda_1"),
    ),
    Kind(
        "normalises only what it has pooled", ("cls_token blocks.{i}.attn.qkv.bias fc_norm !norm",),
        "transformers' classes of DINOv2 normalise every token.",
    ),
    Kind("is a DeiT model with a distillation token", ("dist_token", "distillation_token")),
    Kind(
        "looks like a ViT in transformers' names",
        ("encoder.layer.{i}.layernorm_before !distillation_token !encoder.layer.{i}.lambda_1 !decoder.decoder_embed",),
    ),
    Kind(
        "looks like a CLIP or SigLIP model",
        ("transformer.resblocks.{i}", "embeddings.patch_embedding encoder.layers.{i}.self_attn", "blocks.{i} norm_pre",
         "blocks.{i} attn_pool.latent", "visual.trunk"),
    ),
    Kind(
        "looks like a SAM model",
        ("mask_decoder prompt_encoder", "sam_mask_decoder", "pos_embed blocks.{i}.attn.rel_pos_h"),
    ),
    Kind(
        "has the names of OpenMMLab's MMPretrain or MMSegmentation", ("layers.{i}.ln1 layers.{i}.attn",),
        "Convert the checkpoint that it was made from, which has its authors' names.",
    ),
    Kind("looks like a Swin Transformer", ("layers.{i}.blocks.{i}.attn", "layers.{i}.blocks.{i}.attention")),
    Kind(
        "looks like a ConvNeXt model",
        ("stages.{i}.{i}.dwconv head.weight", "stages.{i}.{i}.grn", "stages.{i}.blocks.{i}.conv_dw",
         "stages.{i}.layers.{i}.dwconv"),
    ),
    Kind("looks like a ResNet", ("layer1.{i}.conv1 layer1.{i}.bn1", "embedder.embedder.convolution")),
)  # fmt: skip
# Larger models that may contain a known backbone; beside one, their other parts do not matter.
HOSTS = (
    Kind(
        "looks like an object detector",
        ("roi_heads", "roi_head", "rpn_head", "bbox_head", "bbox_embed", "bbox_predictor", "model.{i}.cv1.conv"),
    ),
    Kind(
        "looks like a language model",
        ("lm_head !cls_token", "embed_tokens", "tok_embeddings", "word_embeddings", "wte"),
    ),
    Kind(
        "looks like a diffusion model",
        ("model.diffusion_model", "first_stage_model", "down_blocks.{i}.resnets.{i} up_blocks.{i}.resnets.{i}"),
    ),
)  # fmt: skip

_ZERO = f"{merge_zero()}."
_DEQUANTISE = (
    "Convert the original weights. Or load the model with the program that quantised it, dequantise it (in "
    "transformers with model.dequantize()), and save it."
)
_ADAPTERS = ("lora_A", "lora_embedding_A", "lora_down", "hada_w1_a", "lokr_w1", "ia3_l")
PIECES = Kind(
    "is one process's part of a model that FSDP sharded", ("_flat_param", "flat_param_{i}"),
    "Use the teacher_checkpoint.pth that training writes at each evaluation, or save under "
    "FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT).",
)  # fmt: skip
PLACEHOLDERS = Kind("holds empty tensors instead of weights, as DeepSpeed's ZeRO-3 writes them", advice=_ZERO)
STORAGE = (
    PIECES,
    PLACEHOLDERS,
    Kind("is the state of a DeepSpeed optimizer", ("fp32_flat_groups", "single_partition_of_fp32_groups"), _ZERO),
    Kind(
        "has adapters of PEFT, such as LoRA, that are not merged",
        tuple(f"base_layer {name}" for name in _ADAPTERS),
        "Merge them with peft's model.merge_and_unload(), and save the model's state dict.",
    ),
    Kind(
        "holds adapters, such as LoRA, without their model",
        tuple(f"{name} !base_layer" for name in _ADAPTERS),
        "Merge them with peft's PeftModel.from_pretrained(model, DIR).merge_and_unload(), and save the model's state "
        "dict.",
    ),
    Kind("is quantised by bitsandbytes", ("absmax quant_map", "SCB"), _DEQUANTISE),
    Kind("is quantised by GPTQ", ("qweight qzeros g_idx",), _DEQUANTISE),
    Kind("is quantised by AWQ", ("qweight qzeros !g_idx",), _DEQUANTISE),
    Kind("looks quantised by torch", ("_packed_params",), _DEQUANTISE),
    Kind(
        "looks quantised: it has scales of weights",
        ("weight_scale", "weight_scale_inv", "weight_packed", "weight_qdata", "W_q"), _DEQUANTISE,
    ),
    Kind(
        "has the names that transformers 5 uses in memory", ("cls_token encoder.layer.{i}.mlp.gate_proj",),
        "Save the model with model.save_pretrained(DIR), and convert DIR.",
    ),
)  # fmt: skip


def recognise(
    shapes: Mapping[str, Shape],
    where: str,
    others: Collection[str] = (),
    *,
    ranks: Mapping[str, int] | None = None,
    is_part: bool = False,
) -> MappingError | None:
    """Return the error that names what a checkpoint is; None if that is not known.

    Args:
        shapes: The shapes of its tensors, by their names.
        where: Its name for messages.
        others: The names of its objects that are not tensors.
        ranks: The number of dimensions that each tensor has in the family that fits best, if one does.
        is_part: They have the signature of a backbone, which may be a part of one of `HOSTS`.
    """
    found = [*_by_shape(shapes, ranks), *_by_name([*shapes, *others])]
    found = [(kind, name) for kind, name in found if not (is_part and kind in HOSTS)]
    kinds = [(kind, name) for kind, name in found if kind not in STORAGE] or found[:1]
    if not kinds:
        return None
    what = " and ".join(f"{kind.what} ({printable(name)})" for kind, name in kinds)
    advice = next((kind.advice for kind, _ in kinds if kind.advice), "")
    if kinds[0][0] not in STORAGE:
        *first, last = (family.name for family in all_families())
        known = f"{', '.join(first)} and {last}" if first else last
        advice = f"streamconv converts {known}, in their authors' or transformers' names. {advice}".rstrip()
    return MappingError(f"{where} {what}. {advice}", ())


def _by_name(names: Sequence[str]) -> list[tuple[Kind, str]]:
    """Return the kinds with a mark that fits, each with a name that shows it."""
    names = [name for name in names if len(name) <= MAX_SEARCHED_LENGTH]
    lines = (f".{name}.".replace("\n", " ") for name in names)
    # One search in all names is fast, however many there are.
    text = "".join(re.sub(r"\.[0-9]+(?=\.)", ".{i}", line) + "\n" for line in lines)
    found = []
    for kind in (*ARCHITECTURES, *HOSTS, *STORAGE):
        for mark in kind.marks:
            absent = [f".{each[1:]}." for each in mark.split() if each.startswith("!")]
            places = [text.find(f".{each}.") for each in mark.split() if not each.startswith("!")]
            if min(places) >= 0 and not any(each in text for each in absent):
                found.append((kind, names[text.count("\n", 0, places[-1])]))
                break
    return found


def _by_shape(shapes: Mapping[str, Shape], ranks: Mapping[str, int] | None) -> list[tuple[Kind, str]]:
    """Return the kind that the shapes show, with a name; none if they show nothing."""
    matrices = [*shapes] if ranks is None else [name for name in shapes if ranks.get(name, 0) > 1]
    filled = [name for name in matrices if shapes[name] != (0,)]
    if matrices and not filled:
        return [(PLACEHOLDERS, matrices[0])]
    if filled and ranks is not None and all(len(shapes[name]) == 1 for name in matrices):
        return [(PIECES, filled[0])]
    return []
