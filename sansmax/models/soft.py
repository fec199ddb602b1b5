"""SOFT and SOFT++ pyramids: https://arxiv.org/abs/2110.11945 and https://arxiv.org/abs/2207.03341.

Four stages at 1/4, 1/8, 1/16 and 1/32 of the image. The first three attend to landmarks (one per 8 x 8, 4 x 4, 2 x 2
tokens) and normalise after each branch; the last one is a softmax stage with a class token. SOFT++ (`soft_norm_*`)
scales the inverse of the landmarks' kernel and takes another iteration for it; all else is the same.

Three sizes exist twice in what the authors published. Their code gives `soft_small` depths 1, 3, 20, 4 and so 38.9M
parameters; their table says 24M and 3.3G, which depths 1, 3, 7, 4 have: `soft_small_24m`. The first checkpoints of
`soft_tiny` were trained with SOFT++'s inverse: `soft_tiny(inverse="halved")`.

Shapes: b images, n tokens, c channels, (h, w) a map.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.weight_init import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from sansmax.models.attention_soft import SoftAttention
from sansmax.models.blocks import Block
from sansmax.models.contract import start_linear
from sansmax.models.entries import SOFT, SOFT_NORM, build, configuration
from sansmax.models.mlp import Mlp
from sansmax.models.pyramid import Pyramid, Stage

__all__ = ["Soft"]

REDUCTIONS = (4, 8, 16, 32)
RATIOS = (8, 4, 2)
VALUE_KERNELS = (9, 5, 3)


class SoftBlock(nn.Module):
    """`x = norm1(x + attn(x))`, then `norm2(x + mlp(x))`: the norms come after the branches.

    `drop` is the rate of dropout, element by element, of both branches: what the published code calls drop path.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop: float, *, factory: dict, **attn: Any) -> None:
        super().__init__()
        self.attn = SoftAttention(dim, num_heads, qkv_bias=True, **attn, **factory)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **factory)
        gelu: Any = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=gelu, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """The block over the tokens of a (height, width) grid, row by row."""
        # the inverse amplifies the rounding of 16 bit queries, landmarks and values, so autocast stays outside
        with torch.autocast(x.device.type, enabled=False):
            attended = self.attn(x.to(self.attn.q.weight.dtype), grid=grid)
        x = self.norm1(x + self.drop(attended))
        return self.norm2(x + self.drop(self.mlp(x)))


class SoftStage(Stage):
    """Convolutions to the stage's grid, positions, and blocks over its tokens; a class token among them if asked for.

    Blocks are called with the tokens, and with the grid where there is no class token. Convolutions run in the type
    of their weights whatever autocast says, and so do the blocks unless `in_16_bit`: the inverses that follow amplify
    what is rounded before them.
    """

    def __init__(
        self,
        patch_embed: nn.Sequential,
        dim: int,
        grid: tuple[int, int],
        blocks: Sequence[nn.Module],
        class_token: bool,
        in_16_bit: bool,
        drop_rate: float,
        factory: dict,
    ) -> None:
        super().__init__()
        self.grid, self.in_16_bit = grid, in_16_bit
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, **factory)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + class_token, dim, **factory))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(blocks)

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 t c"]:
        """The table for a grid of tokens, between its entries where that is another grid than its own."""
        if tuple(grid) == tuple(self.grid):
            return self.pos_embed
        prefix, table = self.pos_embed.tensor_split([0 if self.cls_token is None else 1], dim=1)
        # as published; not antialiased
        table = F.interpolate(table.mT.unflatten(2, self.grid), size=grid, mode="bilinear")
        return torch.cat((prefix, table.flatten(2).mT), dim=1)

    def forward(self, x: Float[Tensor, "b c_in h_in w_in"]) -> tuple[Tensor, Tensor | None]:
        """The map of this stage, and its class token if it has one."""
        with torch.autocast(x.device.type, enabled=False):
            # channels together, as tokens have them: no map is ever transposed
            x = x.to(self.pos_embed.dtype).contiguous(memory_format=torch.channels_last)
            x = self.patch_embed(x)
        if self.in_16_bit:
            return self._attended(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._attended(x)

    def _attended(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor | None]:
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).mT
        if self.cls_token is None:
            x = self.run(self.blocks, self.pos_drop(x + self.positions(grid)), grid)
            return x.mT.unflatten(2, grid), None
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.run(self.blocks, self.pos_drop(x + self.positions(grid)))
        return x[:, 1:].mT.unflatten(2, grid), x[:, :1]


class Soft(Pyramid):
    """The SOFT pyramid (`normalized=True`: SOFT++).

    `inverse` is "newton" (SOFT), "halved" (SOFT++, and the first SOFT-Tiny) or "cholesky" (exact, for new networks);
    `normalized` scales it. `landmark_grid` averages the landmarks to at most that many rows and columns: 7 x 7 is
    what 224 x 224 images have in every stage, and makes the cost linear in the pixels of larger ones; the published
    networks have no bound. `img_size` is that of the position tables; images may have any size from 32 x 32 on.
    Rates and pooling are timm's. `drop_path_rate` is, as published, dropout of single elements in the first three
    stages, and drops whole branches in the last.

    Raises ValueError for an inverse or a pooling that does not exist, and at use for images that are too small.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 2, 3, 2),
        num_heads: Sequence[int] = (2, 4, 10, 16),
        mlp_ratio: float = 4.0,
        inverse: str | None = None,
        normalized: bool = False,
        landmark_grid: tuple[int, int] | None = None,
        attn_order: str = "auto",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # only what was asked for: timm's layers before 1.0.21 take neither
        factory: dict[str, Any] = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        _check_size(*size)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        attn = {
            "inverse": inverse or ("halved" if normalized else "newton"),
            "normalized": normalized,
            "landmark_grid": landmark_grid,
            "order": attn_order,
            "proj_drop": proj_drop_rate,
        }
        stages, before = [], in_chans
        for i, (dim, depth, heads, reduction) in enumerate(zip(embed_dims, depths, num_heads, REDUCTIONS, strict=True)):
            if i < len(RATIOS):
                options = {**attn, "ratio": RATIOS[i], "value_kernel": VALUE_KERNELS[i]}
                blocks = [
                    SoftBlock(dim, heads, mlp_ratio, next(rates), factory=factory, **options) for _ in range(depth)
                ]
            else:
                blocks = [
                    _last_block(dim, heads, mlp_ratio, proj_drop_rate, next(rates), factory) for _ in range(depth)
                ]
            embed = _first_embed(before, dim, factory) if i == 0 else _embed(before, dim, 2, factory)
            grid = (-(-size[0] // reduction), -(-size[1] // reduction))
            stages.append(SoftStage(embed, dim, grid, blocks, i == len(RATIOS), i > 0, drop_rate, factory))
            before = dim
        super().__init__(
            stages,
            embed_dims,
            REDUCTIONS,
            norm=nn.LayerNorm(embed_dims[-1], eps=1e-6, **factory),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            device=device,
            dtype=dtype,
        )
        self.normalized = normalized
        self.init_weights()

    def init_weights(self) -> None:
        """The published start: linear layers N(0, 0.02), but for those of SOFT++'s blocks, which PyTorch starts."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not (self.normalized and re.match(r"stages\.[0-2]\.blocks", name)):
                start_linear(module)
            elif isinstance(module, SoftStage):
                trunc_normal_(module.pos_embed, std=0.02)
                if module.cls_token is not None:
                    trunc_normal_(module.cls_token, std=0.02)

    def forward_features(self, x: Float[Tensor, "b in_chans h w"]) -> Float[Tensor, "b t c"]:
        """The last stage's tokens after the norm, class token first."""
        _check_size(x.shape[-2], x.shape[-1])
        return super().forward_features(x)

    @property
    def stream_obstacle(self) -> str | None:
        """Why the network cannot run in chunks of tokens."""
        return "its convolutions (patches, landmarks and values) need neighbouring tokens"


def _check_size(height: int, width: int) -> None:
    least = REDUCTIONS[0] * RATIOS[0]
    # 29 px already make 8 tokens, as the convolutions round up; 32 is what one can remember
    if min(height, width) < least:
        raise ValueError(f"SOFT needs images of at least {least} x {least} pixels, got {height} x {width}")


def _first_embed(in_chans: int, dim: int, factory: dict) -> nn.Sequential:
    half = dim // 2
    widths = ((in_chans, half, 2), (half, half, 1), (half, dim, 2))
    return nn.Sequential(*(layer for size in widths for layer in _embed(*size, factory)))


def _embed(before: int, dim: int, stride: int, factory: dict) -> nn.Sequential:
    conv = nn.Conv2d(before, dim, 3, stride=stride, padding=1, **factory)
    return nn.Sequential(conv, nn.BatchNorm2d(dim, **factory), nn.ReLU(inplace=True))


def _last_block(dim: int, heads: int, mlp_ratio: float, drop: float, drop_path: float, factory: dict) -> nn.Module:
    return Block(
        dim,
        heads,
        mlp_ratio,
        qkv_bias=True,
        proj_drop=drop,
        drop_path=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        mlp_layer=Mlp,
        attention="softmax",
        **factory,
    )


# Published names, and where their tensors are here
_PUBLISHED = (
    (r"^pos_embed(\d)$", r"stages.\1.pos_embed"),
    (r"^cls_token$", r"stages.4.cls_token"),
    (r"^patch_embed(\d)\.proj\.", r"stages.\1.patch_embed."),
    (r"^block(\d)\.(\d+)\.att\.", r"stages.\1.blocks.\2."),
    (r"^block(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.mha\.W_([qv])\.", r".attn.\1."),
    (r"\.mha\.attn\.Qlandmark_op\.", r".attn.landmark_conv."),
    (r"\.mha\.attn\.Qnorm_act\.0\.", r".attn.landmark_norm."),
    (r"\.mha\.attn\.conv\.", r".attn.value_conv."),
    (r"\.mha\.ff\.", r".attn.proj."),
    (r"\.ff([12])\.", r".mlp.fc\1."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """The published tensors under the names of `Soft`; those that already have its names stay as they are.

    The published last stage has its queries apart from keys and values: they are joined, rows of queries first.
    """
    del model
    if not any(name.startswith("block1.") for name in state_dict):
        return dict(state_dict)
    found: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if match := re.match(r"^(block4\.\d+\.attn\.)kv\.(weight|bias)$", name):
            continue
        if match := re.match(r"^(block4\.\d+\.attn\.)q\.(weight|bias)$", name):
            others = state_dict.get(f"{match[1]}kv.{match[2]}")
            name = name if others is None else f"{match[1]}qkv.{match[2]}"
            tensor = tensor if others is None else torch.cat((tensor, others))
        for pattern, here in _PUBLISHED:
            name = re.sub(pattern, here, name)
        # published stages count from 1
        found[re.sub(r"^stages\.(\d)", lambda m: f"stages.{int(m[1]) - 1}", name)] = tensor
    return found


_NAMES = [
    f"{family}_{size}"
    for family in ("soft", "soft_norm")
    for size in ("tiny", "small", "small_24m", "medium", "large", "huge")
]
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": configuration(
            "stages.0.patch_embed.0",
            SOFT_NORM if name.startswith("soft_norm") else SOFT,
            min_input_size=(3, 32, 32),
        )
        for name in _NAMES
    }
)

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (1, 2, 3, 2)},
    "small": {"depths": (1, 3, 20, 4)},
    "small_24m": {"depths": (1, 3, 7, 4)},
    "medium": {"depths": (1, 3, 29, 5), "embed_dims": (64, 128, 288, 512), "num_heads": (2, 4, 9, 16)},
    "large": {"depths": (1, 3, 40, 5)},
    "huge": {"depths": (1, 5, 49, 5), "embed_dims": (64, 128, 352, 512), "num_heads": (2, 4, 11, 16)},
}


def _create(variant: str, pretrained: bool, **arguments: Any) -> nn.Module:
    size = variant.removeprefix("soft_").removeprefix("norm_")
    arguments = {"normalized": variant.startswith("soft_norm"), **SIZES[size], **arguments}
    return build(Soft, variant, pretrained, (0, 1, 2, 3), checkpoint_filter_fn, **arguments)


@register_model
def soft_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT-Tiny, 13M."""
    return _create("soft_tiny", pretrained, **kwargs)


@register_model
def soft_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT-Small, 38.9M, the depths of the published code."""
    return _create("soft_small", pretrained, **kwargs)


@register_model
def soft_small_24m(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT-Small, 24.1M, the depths that fit the published table."""
    return _create("soft_small_24m", pretrained, **kwargs)


@register_model
def soft_medium(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT-Medium, 45M."""
    return _create("soft_medium", pretrained, **kwargs)


@register_model
def soft_large(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT-Large, 64M."""
    return _create("soft_large", pretrained, **kwargs)


@register_model
def soft_huge(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT-Huge, 87M."""
    return _create("soft_huge", pretrained, **kwargs)


@register_model
def soft_norm_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT++-Tiny, 13M."""
    return _create("soft_norm_tiny", pretrained, **kwargs)


@register_model
def soft_norm_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT++-Small, 38.9M, the depths of the published code."""
    return _create("soft_norm_small", pretrained, **kwargs)


@register_model
def soft_norm_small_24m(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT++-Small, 24.1M, the depths that fit the published table."""
    return _create("soft_norm_small_24m", pretrained, **kwargs)


@register_model
def soft_norm_medium(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT++-Medium, 45M."""
    return _create("soft_norm_medium", pretrained, **kwargs)


@register_model
def soft_norm_large(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT++-Large, 64M."""
    return _create("soft_norm_large", pretrained, **kwargs)


@register_model
def soft_norm_huge(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT++-Huge, 87M."""
    return _create("soft_norm_huge", pretrained, **kwargs)
