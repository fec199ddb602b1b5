"""Vision transformers with softmax-free attention: SeqNorm ViT, https://arxiv.org/abs/2406.01314.

timm's vision transformer with the block of this package. Without a class token by default: the tokens are averaged
after the last norm, so the logits are the mean of one logit per token, and nothing in the network depends on the
number of tokens. The position table is resampled to the token grid, or absent (`pos_embed="none"`).

Beside timm's contract the model has the pieces that `sansmax.stream` runs in bands of rows: `embed_rows`,
`embed_prefix`, the blocks' two phases, `summarise_pool` and `read_out`.

Shapes: b images, n tokens, t tokens with the prefix, c channels, (gh, gw) the token grid.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.patch_dropout import PatchDropout
from timm.layers.patch_embed import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sansmax.models.blocks import Block
from sansmax.models.entries import SEQNORM, build, configuration
from sansmax.models.stem import ConvStem
from sansmax.ops.moments import Mean, Weight

__all__ = ["VisionTransformer"]


STEMS = {"patch": PatchEmbed, "conv": ConvStem}


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's `VisionTransformer` whose blocks use `attention` ("seqnorm", "sima", ..., or "softmax" as the baseline).

    All arguments of timm's class are taken by name, but for `block_fn`, `attn_layer` and `embed_layer`, which
    `attention` and `stem` set: "patch" is timm's patch embedding, "conv" the overlapping one of `sansmax.models.stem`.
    `attn_order` forces the order in which the layers are computed, `attn_options` go to each of them. Images may have
    any size that is a multiple of the patch.

    Raises ValueError for an attention or a stem that does not exist.
    """

    def __init__(
        self,
        *,
        attention: str = "seqnorm",
        attn_order: str = "auto",
        attn_options: Mapping[str, Any] | None = None,
        stem: str = "patch",
        dynamic_img_size: bool = True,
        **timm_arguments,
    ) -> None:
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        super().__init__(
            embed_layer=STEMS[stem],
            block_fn=partial(  # pyright: ignore[reportArgumentType]
                Block, attention=attention, order=attn_order, attn_options=attn_options
            ),
            dynamic_img_size=dynamic_img_size,
            **timm_arguments,
        )
        self.attention = attention
        # timm before 1.0.21 does not keep it
        self.in_chans: int = timm_arguments.get("in_chans", 3)

    def forward_features(self, x: Tensor, mask: Weight = None) -> Float[Tensor, "b t c"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The tokens after the last block and norm, prefix tokens first.

        `mask` (b, gh gw) is True for real patches, or a weight per patch; prefix tokens always count. The pixels of
        masked patches may be any finite number. Raises ValueError for a mask of another shape.
        """
        self.check_mask(x, mask)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        mask = self._with_prefix(mask)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x, mask)
        return self.norm(x)

    def check_mask(self, x: Tensor, mask: Weight) -> None:
        """Raises ValueError for a mask that does not fit the images `x`."""
        if mask is None:
            return
        gh, gw = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        if mask.shape != (x.shape[0], gh * gw):
            raise ValueError(
                f"a mask has one value per patch, ({x.shape[0]}, {gh * gw}) for {x.shape[0]} images of {gh} x {gw} "
                f"patches, got {tuple(mask.shape)}"
            )

    def forward_head(self, x: Tensor, pre_logits: bool = False, mask: Weight = None) -> Tensor:
        """Logits of the tokens that `forward_features` gives, or the pooled features with `pre_logits`."""
        if mask is None:
            return super().forward_head(x, pre_logits=pre_logits)
        return self.read_out(self._summarise_normed(x, self._with_prefix(mask)), pre_logits=pre_logits)

    def forward(self, x: Tensor, mask: Weight = None) -> Float[Tensor, "b num_classes"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits of images; `mask` as in `forward_features`."""
        return self.forward_head(self.forward_features(x, mask), mask=mask)

    def _with_prefix(self, mask: Weight) -> Tensor | None:
        if mask is None:
            return None
        if isinstance(self.patch_drop, PatchDropout) and self.training:
            raise ValueError("a mask cannot be used together with patch_drop_rate in training")
        if not self.num_prefix_tokens:
            return mask
        return torch.cat((mask.new_ones(mask.shape[0], self.num_prefix_tokens), mask), dim=1)

    # The pieces that a stream runs, in this order.

    @property
    def stream_obstacle(self) -> str | None:
        """Why the network cannot run in chunks of tokens; None where it can."""
        if not all(block.streams for block in self.blocks):
            return f"{self.attention} attention has no summary of fixed size that chunks of tokens could share"
        if isinstance(self.patch_embed, ConvStem):
            return 'its convolutional stem needs the pixels of neighbouring rows (stem="patch" does not)'
        if self.global_pool not in ("avg", "token"):
            return f'it pools by {self.global_pool!r}, which is no sum over tokens ("avg" and "token" are)'
        return None

    def embed_prefix(self) -> Float[Tensor, "1 p c"] | None:
        """Class and register tokens with their positions, or None where the network has none."""
        tokens: list[Tensor] = [t for t in (self.cls_token, self.reg_token) if t is not None]
        if not tokens:
            return None
        x = torch.cat(tokens, dim=1)
        if self.pos_embed is not None and not self.no_embed_class:
            x = x + self.pos_embed[:, : self.num_prefix_tokens]
        return self.norm_pre(x)

    def embed_rows(
        self, pixels: Float[Tensor, "b in_chans h w"], first_row: int, grid: tuple[int, int]
    ) -> Float[Tensor, "b n c"]:
        """Tokens of a band of whole rows of the token grid `grid`, from row `first_row` on, with their positions."""
        return self.embed_region(pixels, (first_row, 0), grid)

    def embed_region(
        self, pixels: Float[Tensor, "b in_chans h w"], first: tuple[int, int], grid: tuple[int, int]
    ) -> Float[Tensor, "b n c"]:
        """Tokens of a rectangle of the token grid `grid` whose upper left one is at `first` (row, column)."""
        size = self.patch_embed.patch_size
        rows, columns = pixels.shape[-2] // size[0], pixels.shape[-1] // size[1]
        x = self.patch_embed(pixels)
        if x.ndim == 3:
            x = x.unflatten(1, (rows, columns))
        if self.pos_embed is not None:
            where = slice(first[0], first[0] + rows), slice(first[1], first[1] + columns)
            x = x + self._positions(where, grid).to(x.dtype)
        return self.norm_pre(x.flatten(1, 2))

    def _positions(self, where: tuple[slice, slice], grid: tuple[int, int]) -> Float[Tensor, "h w c"]:
        assert self.pos_embed is not None
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        size = self.patch_embed.grid_size
        table = self.pos_embed[0, prefix:].unflatten(0, tuple(size))
        if tuple(grid) == tuple(size):
            return table[where]
        # in float32 whatever the type of the table, as timm does
        rows, columns = (
            interpolation_matrix(*n).to(table.device)[part]
            for n, part in zip(zip(size, grid, strict=True), where, strict=True)
        )
        return torch.einsum("rh,hwc,sw->rsc", rows, table.float(), columns)

    def summarise_pool(self, x: Float[Tensor, "b n c"], mask: Weight = None, prefix: bool = False) -> Mean:
        """What the head needs to know of tokens after the last block; `prefix` says they are the prefix tokens."""
        if prefix:
            x = x[:, :1] if self.global_pool == "token" else x[:, : x.shape[1] * self.pool_include_prefix]
            return Mean.of(self.norm(x))
        if self.global_pool == "token":
            x = x[:, :0]
            mask = None if mask is None else mask[:, :0]
        return Mean.of(self.norm(x), mask)

    def _summarise_normed(self, x: Tensor, mask: Weight) -> Mean:
        prefix = self.num_prefix_tokens
        if self.global_pool == "token":
            return Mean.of(x[:, :1])
        if self.global_pool != "avg":
            raise ValueError(f'a mask needs global_pool "avg" or "token", this network pools by {self.global_pool!r}')
        if self.pool_include_prefix or mask is None:
            return Mean.of(x, mask)
        return Mean.of(x[:, prefix:], mask[:, prefix:])

    def read_out(self, pooled: Mean, pre_logits: bool = False) -> Float[Tensor, "b num_classes"]:
        """Logits (or features, with `pre_logits`) from what `summarise_pool` collected over all tokens."""
        x = self.head_drop(self.fc_norm(pooled.value().to(self.fc_dtype)))
        return x if pre_logits else self.head(x)

    @property
    def fc_dtype(self) -> torch.dtype:
        """The type in which the head computes."""
        return next(self.patch_embed.parameters()).dtype


def interpolation_matrix(old: int, new: int) -> Float[Tensor, "new old"]:
    """Bicubic, antialiased resampling of `old` samples to `new` as a matrix.

    Resampling a table of positions is separable, so a band of rows of the new table is `rows @ table @ columns^T`.
    """
    if old == new:
        return torch.eye(old)
    # the identity keeps its width: PyTorch resamples pictures one pixel wide wrongly
    return F.interpolate(torch.eye(old)[None, None], size=(new, old), mode="bicubic", antialias=True)[0, 0]


def _cfg(first_conv: str = "patch_embed.proj", **changes: Any) -> dict[str, Any]:
    return configuration(first_conv, SEQNORM, **{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **changes})


default_cfgs = generate_default_cfgs(
    {
        "seqnorm_vit_tiny_patch16_224.untrained": _cfg(),
        "seqnorm_vit_small_patch16_224.untrained": _cfg(),
        "seqnorm_vit_base_patch16_224.untrained": _cfg(),
        "seqnorm_vit_tiny_patch8_224.untrained": _cfg(min_input_size=(3, 8, 8)),
        "seqnorm_vit_small_patch8_224.untrained": _cfg(min_input_size=(3, 8, 8)),
        "seqnorm_vit_base_patch8_224.untrained": _cfg(min_input_size=(3, 8, 8)),
        "seqnorm_vit_pico_patch8_128.untrained": _cfg(
            input_size=(1, 128, 128), min_input_size=(1, 8, 8), num_classes=10, crop_pct=1.0, mean=(0.5,), std=(0.5,)
        ),
        "seqnorm_vit_pico_conv4_28.untrained": _cfg(
            input_size=(1, 28, 28),
            min_input_size=(1, 4, 4),
            num_classes=2,
            crop_pct=1.0,
            mean=(0.5,),
            std=(0.5,),
            first_conv="patch_embed.proj.0",
        ),
    }
)


def _create(variant: str, pretrained: bool, **arguments) -> nn.Module:
    plain = {"class_token": False, "global_pool": "avg", "fc_norm": False, "qkv_bias": False}
    return build(VisionTransformer, variant, pretrained, 3, **{**plain, **arguments})


@register_model
def seqnorm_vit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """SeqNorm ViT-Ti/16: width 192, 12 layers, 3 heads."""
    arguments = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("seqnorm_vit_tiny_patch16_224", pretrained, **{**arguments, **kwargs})


@register_model
def seqnorm_vit_small_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """SeqNorm ViT-S/16: width 384, 12 layers, 6 heads."""
    arguments = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("seqnorm_vit_small_patch16_224", pretrained, **{**arguments, **kwargs})


@register_model
def seqnorm_vit_base_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """SeqNorm ViT-B/16: width 768, 12 layers, 12 heads."""
    arguments = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("seqnorm_vit_base_patch16_224", pretrained, **{**arguments, **kwargs})


@register_model
def seqnorm_vit_tiny_patch8_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """SeqNorm ViT-Ti/8: width 192, 12 layers, 3 heads, four times the tokens of patches of 16."""
    arguments = {"patch_size": 8, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("seqnorm_vit_tiny_patch8_224", pretrained, **{**arguments, **kwargs})


@register_model
def seqnorm_vit_small_patch8_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """SeqNorm ViT-S/8: width 384, 12 layers, 6 heads, four times the tokens of patches of 16."""
    arguments = {"patch_size": 8, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("seqnorm_vit_small_patch8_224", pretrained, **{**arguments, **kwargs})


@register_model
def seqnorm_vit_base_patch8_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """SeqNorm ViT-B/8: width 768, 12 layers, 12 heads, four times the tokens of patches of 16."""
    arguments = {"patch_size": 8, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("seqnorm_vit_base_patch8_224", pretrained, **{**arguments, **kwargs})


@register_model
def seqnorm_vit_pico_patch8_128(pretrained: bool = False, **kwargs) -> nn.Module:
    """The network of the demo: width 64, 3 layers, 4 heads, grey 8 px patches, no positions (any number of tokens)."""
    arguments = {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "pos_embed": "none"}
    # timm does not take it from the configuration
    arguments["img_size"] = 128
    return _create("seqnorm_vit_pico_patch8_128", pretrained, **{**arguments, **kwargs})


@register_model
def seqnorm_vit_pico_conv4_28(pretrained: bool = False, **kwargs) -> nn.Module:
    """For small sets of small grey images: width 64, 4 layers, 4 heads, a convolutional stem to a grid of 4 px."""
    arguments = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0, "stem": "conv"}
    arguments["img_size"] = 28
    return _create("seqnorm_vit_pico_conv4_28", pretrained, **{**arguments, **kwargs})
