"""The layers of DINOv2, after Meta's dinov2/layers/, with the parameters' names of Meta or timm."""

from torch import Tensor, nn
from torch.nn import functional

from streamconv.families.dinov2_geometry import Dimensions
from streamconv.verification.originals.layers import Block, Mlp


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


class SwiGlu(nn.Module):
    def __init__(self, hidden: int, width: int, has_bias: bool):
        super().__init__()
        self.w12 = nn.Linear(hidden, 2 * width, bias=has_bias)
        self.w3 = nn.Linear(width, hidden, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)  # type: ignore[no-any-return]


class PackedSwiGlu(nn.Module):
    """timm's SwiGLUPacked: the first half of fc1 is the gate, as in `SwiGlu`."""

    def __init__(self, hidden: int, width: int, has_bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(hidden, 2 * width, bias=has_bias)
        self.fc2 = nn.Linear(width, hidden, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(functional.silu(gate) * value)  # type: ignore[no-any-return]


def block(sizes: Dimensions) -> Block:
    kind = PackedSwiGlu if sizes.is_packed else SwiGlu if sizes.swiglu else Mlp
    mlp = kind(sizes.hidden, sizes.ffn, sizes.has_ffn_bias)
    return Block(sizes.hidden, sizes.epsilon, Attention(sizes), mlp, sizes.has_layer_scale)


class PatchEmbed(nn.Module):
    def __init__(self, sizes: Dimensions):
        super().__init__()
        self.proj = nn.Conv2d(sizes.channels, sizes.hidden, sizes.patch, stride=sizes.patch, bias=sizes.has_patch_bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]
