"""DINOv2 for inference, after Meta's dinov2/models/vision_transformer.py and layers/.

Parameters, attributes and methods have Meta's names, and operations Meta's order. So its files load
strictly, the results are equal bit for bit, and `states` can run Meta's code as well as this one.
Training and masks are omitted, and so are chunks of blocks, which do not change the results.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamconv.families.base import Model
from streamconv.families.dinov2_geometry import Dimensions
from streamconv.verification.originals import OriginalArchitecture, OwnWay

REPOSITORY = "facebookresearch/dinov2"
RESIZED_POSITIONS = OwnWay(
    changes="the original's own way to resize position embeddings changes outputs",
    for_check="it resized them like transformers",
    explanation=(
        "At sizes other than the native one, position embeddings are interpolated from N to n patches per side. Meta's "
        "code scales them by (n + 0.1) / N, and transformers by n / N. So the two differ, whatever the weights are. "
        "For the check above, both models interpolated like transformers."
    ),
)
INTERPOLATE_OFFSET = 0.1  # positions are scaled by (n + 0.1) / 37; models with registers have no offset


class Attention(nn.Module):
    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.heads = sizes.num_heads
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=sizes.has_qkv_bias)
        self.proj = nn.Linear(sizes.hidden, sizes.hidden, bias=sizes.has_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        # (B, T, 3, heads, size) to three tensors (B, heads, T, size)
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, hidden))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int, has_bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(hidden, width, bias=has_bias)
        self.fc2 = nn.Linear(width, hidden, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class SwiGlu(nn.Module):
    def __init__(self, hidden: int, width: int, has_bias: bool):
        super().__init__()
        self.w12 = nn.Linear(hidden, 2 * width, bias=has_bias)
        self.w3 = nn.Linear(width, hidden, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.hidden, eps=sizes.epsilon)
        self.attn = Attention(sizes)
        self.ls1 = LayerScale(sizes.hidden) if sizes.has_layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(sizes.hidden, eps=sizes.epsilon)
        self.mlp = (SwiGlu if sizes.swiglu else Mlp)(sizes.hidden, sizes.ffn, sizes.has_ffn_bias)
        self.ls2 = LayerScale(sizes.hidden) if sizes.has_layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.proj = nn.Conv2d(sizes.channels, sizes.hidden, sizes.patch, stride=sizes.patch, bias=sizes.has_patch_bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """The backbone, with a linear head if the sizes have classes."""

    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.patch_size = sizes.patch
        self.num_register_tokens = sizes.registers
        self.interpolate_offset = 0.0 if sizes.registers else INTERPOLATE_OFFSET
        self.interpolate_antialias = bool(sizes.registers)
        self.patch_embed = PatchEmbed(sizes)
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.hidden))
        self.pos_embed = nn.Parameter(torch.empty(1, sizes.positions, sizes.hidden))
        if sizes.registers or sizes.has_empty_registers:
            self.register_tokens = nn.Parameter(torch.empty(1, sizes.registers, sizes.hidden))
        if sizes.has_mask_token:
            self.register_parameter(sizes.mask_key, nn.Parameter(torch.empty(1, sizes.hidden)))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.hidden, eps=sizes.epsilon)
        if sizes.classes:
            self.linear_head = nn.Linear(2 * sizes.hidden, sizes.classes)

    def prepare_tokens_with_masks(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.interpolate_pos_encoding(x, *pixels.shape[2:])
        if self.num_register_tokens:
            x = torch.cat((x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)
        return x

    def interpolate_pos_encoding(self, x: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings for the grid of an image of this size: scaled by Meta's factor or, without an offset,
        resized to the grid."""
        if x.shape[1] == self.pos_embed.shape[1] and height == width:
            return self.pos_embed
        positions = self.pos_embed.float()
        side = math.isqrt(positions.shape[1] - 1)
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        rows, columns = height // self.patch_size, width // self.patch_size
        if self.interpolate_offset:
            scale = tuple((n + self.interpolate_offset) / side for n in (rows, columns))
            grid = functional.interpolate(
                grid, scale_factor=scale, mode="bicubic", antialias=self.interpolate_antialias
            )
        else:
            grid = functional.interpolate(
                grid, size=(rows, columns), mode="bicubic", antialias=self.interpolate_antialias
            )
        grid = grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)
        return torch.cat((positions[:, :1], grid), dim=1).to(x.dtype)


def build(sizes: Dimensions) -> VisionTransformer:
    return VisionTransformer(sizes)


def load(repository: str, source: str, model: Model) -> Any:
    """Load Meta's own model, with its head moved into it as in `VisionTransformer`. Runs the repository's code."""
    load_entry: Any = torch.hub.load
    entry = model.name.removesuffix("_1layer")
    arguments: dict[str, Any] = {"source": source, "trust_repo": True, "verbose": False, "pretrained": False}
    if model.head is None:
        original = load_entry(repository, entry, **arguments)
    else:
        classifier: Any = load_entry(repository, f"{entry}_lc", layers=1, **arguments)
        original = classifier.backbone
        original.linear_head = classifier.linear_head
    if not isinstance(original, nn.Module) or not hasattr(original, "prepare_tokens_with_masks"):
        raise TypeError(f"it returns a {type(original).__name__}, which is not the authors' model")
    _use_torch_attention(original)
    return original


def _use_torch_attention(original: nn.Module) -> None:
    """Make Meta's code use torch's attention: that of xFormers, if installed, needs a GPU and has no float64.

    Meta's attention reads a global of its module. The modules are this model's own: see `reference`.
    """
    for module in original.modules():
        namespace = getattr(type(module).forward, "__globals__", {})
        if "XFORMERS_AVAILABLE" in namespace:
            namespace["XFORMERS_AVAILABLE"] = False


def states(model: Any, pixels: Tensor, as_transformers: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Run Meta's model or ours on ``pixels``, (B, C, H, W), and yield each layer's output by name.

    Yields "embeddings" and "layer 0", "layer 1", …, (B, T, D) each; after the last norm "cls" (B, 1, D),
    "registers" (B, R, D) if the model has them, and "patches" (B, P, D); and "logits" (B, K) if it has a head.
    At other sizes than the native one, positions are interpolated by Meta's factor or, with
    ``as_transformers``, to the grid's size, as transformers does since its pull request 33226.
    """
    registers = model.num_register_tokens
    model.interpolate_offset = 0.0 if as_transformers or registers else INTERPOLATE_OFFSET
    x = model.prepare_tokens_with_masks(pixels)
    yield "embeddings", x
    for i, block in enumerate(model.blocks):
        x = block(x)
        yield f"layer {i}", x
    x = model.norm(x)
    cls, patches = x[:, :1], x[:, 1 + registers :]
    yield "cls", cls
    if registers:
        yield "registers", x[:, 1 : 1 + registers]
    yield "patches", patches
    if hasattr(model, "linear_head"):
        yield "logits", model.linear_head(torch.cat((cls[:, 0], patches.mean(dim=1)), dim=1))


def prefix_tokens(sizes: Dimensions) -> dict[str, int]:
    return {"cls": 1, **({"registers": sizes.registers} if sizes.registers else {})}


ARCHITECTURE = OriginalArchitecture(
    repository=REPOSITORY,
    build=build,
    load=load,
    states=states,
    prefix_tokens=prefix_tokens,
    own_way=lambda sizes, is_native: None if is_native or sizes.registers else RESIZED_POSITIONS,
)
