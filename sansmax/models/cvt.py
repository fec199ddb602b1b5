"""CvT with softmax, https://arxiv.org/abs/2103.15808, and with SimA in its place, https://arxiv.org/abs/2206.08898.

Three stages. Each starts with an overlapping convolution and a LayerNorm, and has pre-norm blocks whose queries, keys
and values are a depthwise convolution with BatchNorm, then a linear layer; keys and values are convolved with stride 2,
so there are a quarter as many. There are no positions: images may have any size. The class token joins in the last
stage and skips the convolutions.

As in the authors' code (https://github.com/microsoft/CvT) the scores are divided by the root of the stage's whole
width, not of the width of a head; the MLP has QuickGELU, x sigmoid(1.702 x); LayerNorm's eps is 1e-5; drop path grows
from 0 within the last stage and is absent before. Hugging Face's port has exact GELU instead: for its numbers pass
`act_layer="gelu"`. `checkpoint_filter_fn` takes the names of both.

SimA normalises queries over their tokens and keys over theirs, the class token among both in the last stage.

Shapes: b images, n tokens, m keys, h heads, d channels per head, c channels.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.create_act import get_act_layer
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from sansmax.models.contract import start_linear
from sansmax.models.entries import CVT, SIMA, build, configuration
from sansmax.models.mlp import Mlp
from sansmax.models.pyramid import Pyramid, Stage
from sansmax.ops import sima_of_keys
from sansmax.ops.checks import check_choice, check_num_heads

__all__ = ["Cvt", "checkpoint_filter_fn"]

PATCHES = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding of the convolution that starts a stage
REDUCTIONS = (4, 8, 16)


def softmax_of_width(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"]
) -> Float[Tensor, "b h n d"]:
    """softmax(Q K^T / sqrt(h d)) V: the root is that of the whole width."""
    return F.scaled_dot_product_attention(q, k, v, scale=(q.shape[1] * q.shape[3]) ** -0.5)


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": softmax_of_width,
    "sima": sima_of_keys,
}


class ConvAttention(nn.Module):
    """Multi-head attention whose queries, keys and values are convolved before they are projected.

    Raises ValueError if `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self, dim: int, num_heads: int, class_token: bool, attention: str, proj_drop: float, factory: dict
    ) -> None:
        super().__init__()
        check_num_heads(dim, num_heads)
        self.num_heads, self.num_prefix_tokens, self.attention = num_heads, int(class_token), attention
        self.conv_q = _conv_norm(dim, 1, factory)
        self.conv_k = _conv_norm(dim, 2, factory)
        self.conv_v = _conv_norm(dim, 2, factory)
        self.q = nn.Linear(dim, dim, **factory)
        self.k = nn.Linear(dim, dim, **factory)
        self.v = nn.Linear(dim, dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """Attention over the tokens of a map of this size, class token first where there is one."""
        cls, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        grid = tokens.mT.unflatten(2, size)
        heads = []
        for conv, linear in ((self.conv_q, self.q), (self.conv_k, self.k), (self.conv_v, self.v)):
            convolved = torch.cat((cls, conv(grid).flatten(2).mT), dim=1)
            heads.append(linear(convolved).unflatten(2, (self.num_heads, -1)).transpose(1, 2))
        kind = x.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        if self.attention == "softmax" or not half:
            out = ATTENTIONS[self.attention](*heads)
            return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        # what SimA gives shrinks with the number of tokens, and float16 has no room for it
        with torch.autocast(kind, enabled=False):
            out = ATTENTIONS[self.attention](*(head.float() for head in heads))
            return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class ConvBlock(nn.Module):
    """Pre-norm block, `x + attn(norm1(x))` then `x + mlp(norm2(x))`."""

    def __init__(
        self,
        dim: int,
        attn: ConvAttention,
        mlp_ratio: float,
        act_layer: type[nn.Module],
        proj_drop: float,
        drop_path: float,
        factory: dict,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **factory)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """The block over the tokens of a map of this size."""
        x = x + self.drop_path1(self.attn(self.norm1(x), size))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ConvEmbed(nn.Module):
    """An overlapping convolution, then LayerNorm over the channels of each token."""

    def __init__(self, in_chans: int, dim: int, patch: tuple[int, int, int], factory: dict) -> None:
        super().__init__()
        kernel, stride, padding = patch
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=padding, **factory)
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Float[Tensor, "b c_in h_in w_in"]) -> Float[Tensor, "b h w c"]:
        """The tokens of a map."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvStage(Stage):
    """Tokens of the map before, a class token among them if asked for, and blocks."""

    def __init__(
        self,
        patch_embed: ConvEmbed,
        dim: int,
        blocks: Sequence[nn.Module],
        class_token: bool,
        drop: float,
        factory: dict,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, **factory)) if class_token else None
        self.pos_drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Float[Tensor, "b c_in h_in w_in"]) -> tuple[Tensor, Tensor | None]:
        """The map of this stage, and its class token if it has one."""
        x = self.patch_embed(x)
        size = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if self.cls_token is None:
            return self.run(self.blocks, self.pos_drop(x), size).mT.unflatten(2, size), None
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.run(self.blocks, self.pos_drop(x), size)
        return x[:, 1:].mT.unflatten(2, size), x[:, :1]


class Cvt(Pyramid):
    """The CvT pyramid; `attention` is "softmax" (CvT) or "sima".

    `act_layer` is a name of timm or a class. `img_size` is accepted and not used: the weights fit images of any size
    from 3 x 3 pixels on. Rates are timm's; `drop_path_rate` is that of the last block, in the last stage alone.

    Raises ValueError for an attention, an activation or a pooling that does not exist, heads that do not divide the
    width, and at use for images that are too small.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: Sequence[int] = (64, 192, 384),
        depths: Sequence[int] = (1, 2, 10),
        num_heads: Sequence[int] = (1, 3, 6),
        mlp_ratio: float = 4.0,
        attention: str = "softmax",
        act_layer: str | type[nn.Module] = "quick_gelu",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        del img_size
        check_choice("attention", attention, tuple(ATTENTIONS), "CvT")
        # only what was asked for: timm's layers before 1.0.21 take neither
        factory: dict[str, Any] = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        act, stages, before = _activation(act_layer), [], in_chans
        for i, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            last = i == len(PATCHES) - 1
            rates = torch.linspace(0, drop_path_rate if last else 0.0, depth, device="cpu").tolist()
            attns = [ConvAttention(dim, heads, last, attention, proj_drop_rate, factory) for _ in rates]
            blocks = [
                ConvBlock(dim, attn, mlp_ratio, act, proj_drop_rate, rate, factory)
                for attn, rate in zip(attns, rates, strict=True)
            ]
            embed = ConvEmbed(before, dim, PATCHES[i], factory)
            stages.append(ConvStage(embed, dim, blocks, last, pos_drop_rate, factory))
            before = dim
        super().__init__(
            stages,
            embed_dims,
            REDUCTIONS,
            norm=nn.LayerNorm(embed_dims[-1], **factory),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            device=device,
            dtype=dtype,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """The published start: linear layers and the class token N(0, 0.02), biases 0, the rest as PyTorch does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                start_linear(module)
            elif isinstance(module, ConvStage):
                if module.cls_token is not None:
                    trunc_normal_(module.cls_token, std=0.02)
            elif isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.LayerNorm):
                module.reset_parameters()

    def forward_features(self, x: Float[Tensor, "b in_chans h w"]) -> Float[Tensor, "b t c"]:
        """The last stage's tokens after the norm, class token first."""
        if min(x.shape[-2:]) < 3:
            height, width = x.shape[-2:]
            raise ValueError(f"CvT needs images of at least 3 x 3 pixels, got {height} x {width}; enlarge or pad them")
        return super().forward_features(x)

    @property
    def stream_obstacle(self) -> str | None:
        """Why the network cannot run in chunks of tokens."""
        return "its convolutions (patches, queries, keys and values) need neighbouring tokens"


def _activation(act_layer: str | type[nn.Module]) -> Any:
    try:
        return get_act_layer(act_layer)
    except KeyError as e:
        raise ValueError(
            f'act_layer must be a name that timm knows, such as "quick_gelu" or "gelu", or a class, got {act_layer!r}'
        ) from e


def _conv_norm(dim: int, stride: int, factory: dict) -> nn.Sequential:
    conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False, **factory)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(dim, **factory)))


# names of Hugging Face's port, then of the authors' code
_KINDS = {"query": "q", "key": "k", "value": "v"}
_RENAMES: tuple[tuple[str, Any], ...] = (
    (r"^(?:cvt\.)?encoder\.stages\.(\d+)\.", r"stages.\1."),
    (r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (
        r"\.attention\.attention\.convolution_projection_(query|key|value)\.convolution_projection\.(convolution|norm)",
        lambda m: f".attn.conv_{_KINDS[m[1]]}.{m[2]}",
    ),
    (r"(\.attn\.conv_[qkv])\.convolution\.", r"\1.conv."),
    (r"(\.attn\.conv_[qkv])\.normalization\.", r"\1.bn."),
    (r"\.attention\.attention\.projection_(query|key|value)\.", lambda m: f".attn.{_KINDS[m[1]]}."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^stage(\d+)\.", r"stages.\1."),
    (r"\.attn\.conv_proj_([qkv])\.", r".attn.conv_\1."),
    (r"\.attn\.proj_([qkv])\.", r".attn.\1."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """The same tensors under this package's names, from those of the authors, of Hugging Face, or its own."""
    del model
    return {_renamed(name): x for name, x in state_dict.items()}


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


_CVT = configuration("stages.0.patch_embed.proj", CVT, crop_pct=0.875)

default_cfgs = generate_default_cfgs(
    {
        "cvt_13.untrained": _CVT,
        "cvt_21.untrained": _CVT,
        "sima_cvt_13.untrained": {**_CVT, **SIMA},
        "sima_cvt_21.untrained": {**_CVT, **SIMA},
    }
)


def _create(variant: str, pretrained: bool, **arguments) -> nn.Module:
    return build(Cvt, variant, pretrained, (0, 1, 2), checkpoint_filter_fn, **arguments)


@register_model
def cvt_13(pretrained: bool = False, **kwargs) -> nn.Module:
    """CvT-13: widths 64, 192, 384, depths 1, 2, 10."""
    return _create("cvt_13", pretrained, **kwargs)


@register_model
def cvt_21(pretrained: bool = False, **kwargs) -> nn.Module:
    """CvT-21: widths 64, 192, 384, depths 1, 4, 16."""
    return _create("cvt_21", pretrained, **{"depths": (1, 4, 16), **kwargs})


@register_model
def sima_cvt_13(pretrained: bool = False, **kwargs) -> nn.Module:
    """CvT-13 with SimA in the place of softmax."""
    return _create("sima_cvt_13", pretrained, **{"attention": "sima", **kwargs})


@register_model
def sima_cvt_21(pretrained: bool = False, **kwargs) -> nn.Module:
    """CvT-21 with SimA in the place of softmax."""
    return _create("sima_cvt_21", pretrained, **{"attention": "sima", "depths": (1, 4, 16), **kwargs})
