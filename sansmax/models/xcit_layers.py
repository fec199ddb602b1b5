"""The layers of XCiT: a convolutional stem, Fourier positions, and a block that looks at the neighbours.

XCiT (https://arxiv.org/abs/2106.09681, section 3.3) mixes tokens twice in a block: by attention, and by two depthwise
3 x 3 convolutions, the "local patch interaction". The names of parameters are those of its published checkpoints.

Tokens (b, n, c) are the grid (b, c, gh, gw) in PyTorch's channels-last layout, so none of the layers copies them.

Shapes: b images, n = gh gw tokens, c channels, (gh, gw) the token grid, p pixels per side of a patch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.drop import DropPath
from torch import Tensor, nn

from sansmax.models.attention import SimAAttention
from sansmax.models.class_attention import NORM_EPS
from sansmax.models.linear import Linear
from sansmax.models.mlp import Mlp

# channels of the sine and cosine table per axis, and the longest wavelength: section "Attention is all you need", 3.5
FREQUENCIES, TEMPERATURE = 32, 10000.0


class PatchStem(nn.Module):
    """`log2(patch_size)` convolutions 3 x 3 of stride 2, each with batch norm, GELU between them.

    The widths double up to `embed_dim`. In evaluation the batch norm is folded into the convolution's weights, so the
    modules of `proj` are not called one by one.

    Raises ValueError unless `patch_size` is a power of two up to 32, and for images that are no multiple of it.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size not in (2, 4, 8, 16, 32):
            raise ValueError(f"a convolutional stem needs a patch_size of 2, 4, 8, 16 or 32, got {patch_size}")
        height, width = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.patch_size = (patch_size, patch_size)
        self.img_size = (height, width)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        for step in reversed(range(patch_size.bit_length() - 1)):
            out = embed_dim // 2**step
            conv = nn.Conv2d(in_chans, out, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(out, device=device, dtype=dtype)), nn.GELU()]
            in_chans = out
        self.proj = nn.Sequential(*layers[:-1])

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The token grid of images of this size; both sides must be a multiple of the patch."""
        (height, width), patch = img_size, self.patch_size[0]
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"an image of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}; both sides "
                f"must be a multiple of {patch}: resize, crop or pad it"
            )
        return height // patch, width // patch

    def forward(self, x: Float[Tensor, "b in_chans h w"]) -> Float[Tensor, "b c gh gw"]:
        """The tokens as a grid."""
        self.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.proj:
            x = convolved(layer[0], layer[1], x) if isinstance(layer, nn.Sequential) else layer(x)
        return x


def convolved(conv: Any, norm: Any, x: Float[Tensor, "b c_in h_in w_in"]) -> Float[Tensor, "b c h w"]:
    """`norm(conv(x))`; where the norm is a fixed map, as in evaluation, by one convolution of other weights."""
    if norm.training or norm.running_mean is None:
        return norm(conv(x))
    with torch.autocast(x.device.type, enabled=False):
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight, bias = conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
    # in the layout of `x`: the convolution would turn them round at every call
    weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


class FourierPositions(nn.Module):
    """Positions of tokens on a grid of any size: sines and cosines of row and column, projected to `dim` channels.

    Rows and columns are numbered from 1 and scaled so that the last is at 2 pi (divided by the number of rows plus
    1e-6, as published): a position is a share of the image, whatever its size. Channels are 16 wavelengths of the
    row, sine and cosine in turn, then those of the column. The table is made in float32 in every type, as published.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * FREQUENCIES, dim, kernel_size=1, device=device, dtype=dtype)

    def forward(self, gh: int, gw: int) -> Float[Tensor, "n c"]:
        """The positions of all tokens, row by row."""
        weight, bias = self.token_projection.weight, self.token_projection.bias
        rows, columns = (_waves(size, weight.device) for size in (gh, gw))
        rows, columns = rows.unsqueeze(1).expand(-1, gw, -1), columns.unsqueeze(0).expand(gh, -1, -1)
        table = torch.cat((rows, columns), dim=-1).flatten(0, 1)
        # in 16 bit this one product would cost half of the digits that the logits lose under autocast
        with torch.autocast(weight.device.type, enabled=False):
            return F.linear(table.to(weight.dtype), weight.flatten(1), bias)


def _waves(size: int, device: torch.device) -> Float[Tensor, "size f"]:
    at = torch.arange(1, size + 1, device=device).to(torch.float32)
    at = at / (at[-1:] + 1e-6) * (2 * math.pi)
    pair = torch.arange(FREQUENCIES, device=device).to(torch.float32) // 2
    angle = at.unsqueeze(-1) / TEMPERATURE ** (2 * pair / FREQUENCIES)
    return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)


class LocalPatchInteraction(nn.Module):
    """Depthwise convolution, GELU, batch norm, depthwise convolution: each token meets those two steps around it."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b n c"], gh: int, gw: int) -> Float[Tensor, "b n c"]:
        """Each token from its neighbours on the grid of `gh` rows; beyond the edge there is nothing."""
        # these few products per number are bound by memory: narrow copies would cost what they save, and digits
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.conv1.weight.dtype).mT.unflatten(2, (gh, gw))
            return self.conv2(self.bn(self.act(self.conv1(x)))).flatten(2).mT


class XCiTBlock(nn.Module):
    """SimA attention, local patch interaction and MLP, each pre-norm, with a gain per channel, beside a residual.

    In this order, though the MLP's names have the number 2. `eta` is the start of the gains `gamma1` to `gamma3`.
    `order` and `attn_options` go to `sansmax.models.attention.SimAAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        eta: float = 1.0,
        order: str = "auto",
        attn_options: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # only what was asked for: timm's layers before 1.0.21 take neither
        factory: dict[str, Any] = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        self.eta = eta
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.attn = SimAAttention(
            dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, order=order, **(attn_options or {}), **factory
        )
        self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.local_mp = LocalPatchInteraction(dim, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        hidden = int(dim * mlp_ratio)
        self.mlp = Mlp(dim, hidden, drop=proj_drop, **factory)
        # with those of the MLP nearly all products of the network
        self.attn.qkv, self.attn.proj = Linear(dim, 3 * dim, bias=qkv_bias, **factory), Linear(dim, dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.gamma1, self.gamma2, self.gamma3 = (nn.Parameter(torch.full((dim,), eta, **factory)) for _ in range(3))

    def forward(self, x: Float[Tensor, "b n c"], gh: int, gw: int) -> Float[Tensor, "b n c"]:
        """The tokens of a grid of `gh` rows and `gw` columns, row by row."""
        x = torch.addcmul(x, self.gamma1, self.drop_path(self.attn(self.norm1(x))))
        x = torch.addcmul(x, self.gamma3, self.drop_path(self.local_mp(self.norm3(x), gh, gw)))
        return torch.addcmul(x, self.gamma2, self.drop_path(self.mlp(self.norm2(x))))
