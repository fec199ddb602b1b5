"""SimA on XCiT, the published networks: https://arxiv.org/abs/2206.08898 on https://arxiv.org/abs/2106.09681.

For images of any size that is a multiple of the patch: a convolutional stem, Fourier positions, blocks of SimA
attention, local patch interaction and MLP, and at the end two blocks in which a class token gathers from the patches.
Names of parameters are those of the authors' checkpoints, but for the positions (`checkpoint_filter_fn`).

Shapes: b images, n patch tokens, t tokens with the class token first, c channels, (gh, gw) the token grid.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.weight_init import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from sansmax.models.class_attention import NORM_EPS, ClassAttentionBlock
from sansmax.models.contract import TokenNetwork, check_output_fmt, start_linear, take_indices
from sansmax.models.entries import SIMA, build, configuration
from sansmax.models.rerun import rerun
from sansmax.models.xcit_layers import FourierPositions, PatchStem, XCiTBlock

__all__ = ["SimAXCiT"]


class SimAXCiT(TokenNetwork):
    """XCiT with SimA attention, as published, under timm's contract.

    Arguments are those of timm's XCiT: `drop_path_rate` is the same in all blocks, `eta` starts the gains, and the
    class token's blocks norm all tokens or with `tokens_norm=False` only their own. `global_pool` is "token" (as
    published), "avg", "max" or "avgmax" of the patch tokens after the last norm, or "" for all tokens. `attn_order`
    and `attn_options` go to each `sansmax.models.attention.SimAAttention`. SimA works with a single head, too.

    There are no masks: the local convolutions would mix padding into its neighbours.

    Raises ValueError for images that are no multiple of the patch, another pooling, and heads that do not divide the
    width.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        cls_attn_layers: int = 2,
        use_pos_embed: bool = True,
        eta: float = 1.0,
        tokens_norm: bool = True,
        attn_order: str = "auto",
        attn_options: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, 1, num_classes, in_chans, global_pool)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.patch_embed = PatchStem(img_size, patch_size, in_chans, embed_dim, **factory)
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.empty(1, 1, embed_dim, **factory))
        self.pos_embed = FourierPositions(embed_dim, **factory) if use_pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        same = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, "eta": eta, **factory}
        own = {"drop_path": drop_path_rate, "order": attn_order, "attn_options": attn_options}
        self.blocks = nn.ModuleList([XCiTBlock(embed_dim, num_heads, **own, **same) for _ in range(depth)])
        self.cls_attn_blocks = nn.ModuleList(
            [ClassAttentionBlock(embed_dim, num_heads, tokens_norm=tokens_norm, **same) for _ in range(cls_attn_layers)]
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS, **factory)
        self.add_head(drop_rate, factory)
        self.init_weights()

    def init_weights(self) -> None:
        """The start of training, as published: normal weights of deviation 0.02 in linear layers, gains at `eta`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                start_linear(module)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm | nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()
            elif isinstance(module, XCiTBlock | ClassAttentionBlock):
                for name, gain in module.named_parameters(recurse=False):
                    assert name.startswith("gamma")
                    nn.init.constant_(gain, module.eta)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    # The forward pass

    def _embed(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.patch_embed(x)
        gh, gw = x.shape[-2:]
        x = x.flatten(2).mT
        if self.pos_embed is not None:
            x = x + self.pos_embed(gh, gw)
        return self.pos_drop(x.contiguous()), gh, gw

    def _run(self, block: nn.Module, x: Tensor, *arguments: Any) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return block(x, *arguments)
        return rerun(block, x, *arguments)

    def _gather(self, x: Tensor, only_class: bool = False) -> Tensor:
        # the class token's blocks and the last norm
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for i, block in enumerate(self.cls_attn_blocks):
            x = self._run(block, x, only_class and i == len(self.cls_attn_blocks) - 1)
        return self.norm(x)

    def forward_features(self, x: Float[Tensor, "b in_chans h w"]) -> Float[Tensor, "b t c"]:
        """The tokens after the last norm, class token first."""
        x, gh, gw = self._embed(x)
        for block in self.blocks:
            x = self._run(block, x, gh, gw)
        return self._gather(x)

    def forward(self, x: Float[Tensor, "b in_chans h w"]) -> Tensor:
        """Logits of images; once, in training too."""
        x, gh, gw = self._embed(x)
        for block in self.blocks:
            x = self._run(block, x, gh, gw)
        # a head on the class token reads no patch token of the last block
        return self.forward_head(self._gather(x, only_class=self.global_pool == "token"))

    def forward_intermediates(
        self,
        x: Float[Tensor, "b in_chans h w"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> Any:
        """Maps of the blocks, and the last tokens unless `intermediates_only`.

        `indices` are the blocks wanted, the last n if an int, None for all; `norm` applies the last norm to each;
        `stop_early` leaves out the blocks after the last one wanted. `output_fmt` is "NCHW" or "NLC".

        Raises ValueError for another format, and for `return_prefix_tokens`: the class token joins after the blocks.
        """
        check_output_fmt(output_fmt)
        if return_prefix_tokens:
            raise ValueError("return_prefix_tokens cannot be had: the class token joins after the blocks; leave it out")
        wanted, last = take_indices(len(self.blocks), indices)
        x, gh, gw = self._embed(x)
        found = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x, gh, gw)
            if i in wanted:
                tokens = self.norm(x) if norm else x
                found.append(tokens.mT.unflatten(2, (gh, gw)).contiguous() if output_fmt == "NCHW" else tokens)
        return found if intermediates_only else (self._gather(x), found)

    # What timm asks for

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leaves out what `forward_intermediates` does not need; with the head goes the class token."""
        wanted, last = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.cls_attn_blocks, self.cls_token, self.num_prefix_tokens = nn.ModuleList(), None, 0
            self.reset_classifier(0, "")
        return wanted

    def no_weight_decay(self) -> set[str]:
        """Parameters of several axes that are not decayed; those of one axis are not, either."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How parameters are grouped by layer, from the image to the classifier."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": r"^blocks\.(\d+)",
            "cls_attn_blocks": [(r"^cls_attn_blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether activations of the blocks are made again in backward instead of kept."""
        self.grad_checkpointing = enable

    @property
    def stream_obstacle(self) -> str | None:
        """Why the network cannot run in chunks of tokens."""
        return "its blocks have local 3 x 3 convolutions, which need the neighbours of each token"


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The names of this module for the published ones, and for its own; sizes stay as they are."""
    del model
    return {name.replace("pos_embeder.", "pos_embed.", 1): value for name, value in state_dict.items()}


# width, depth, heads; the deep ones start with small gains
SIZES = {
    "nano_12": (128, 12, 4),
    "tiny_12": (192, 12, 4),
    "small_12": (384, 12, 8),
    "tiny_24": (192, 24, 4),
    "small_24": (384, 24, 8),
    "medium_24": (512, 24, 8),
    "large_24": (768, 24, 16),
}
default_cfgs = generate_default_cfgs(
    {
        f"sima_{size}_p{patch}.untrained": configuration(
            "patch_embed.proj.0.0", SIMA, crop_pct=0.875, min_input_size=(3, patch, patch)
        )
        for size in SIZES
        for patch in (16, 8)
    }
)


def _create(variant: str, pretrained: bool, **arguments) -> nn.Module:
    size, _, patch = variant.removeprefix("sima_").rpartition("_p")
    embed_dim, depth, num_heads = SIZES[size]
    published = {
        "patch_size": int(patch),
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "eta": 1.0 if depth < 24 else 1e-5,
        "tokens_norm": size != "nano_12",
    }
    return build(SimAXCiT, variant, pretrained, 3, checkpoint_filter_fn, **{**published, **arguments})


@register_model
def sima_nano_12_p16(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-N12/16: width 128, 12 blocks, 4 heads."""
    return _create("sima_nano_12_p16", pretrained, **kwargs)


@register_model
def sima_tiny_12_p16(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-T12/16: width 192, 12 blocks, 4 heads."""
    return _create("sima_tiny_12_p16", pretrained, **kwargs)


@register_model
def sima_small_12_p16(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-S12/16: width 384, 12 blocks, 8 heads."""
    return _create("sima_small_12_p16", pretrained, **kwargs)


@register_model
def sima_tiny_24_p16(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-T24/16: width 192, 24 blocks, 4 heads."""
    return _create("sima_tiny_24_p16", pretrained, **kwargs)


@register_model
def sima_small_24_p16(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-S24/16: width 384, 24 blocks, 8 heads."""
    return _create("sima_small_24_p16", pretrained, **kwargs)


@register_model
def sima_medium_24_p16(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-M24/16: width 512, 24 blocks, 8 heads."""
    return _create("sima_medium_24_p16", pretrained, **kwargs)


@register_model
def sima_large_24_p16(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-L24/16: width 768, 24 blocks, 16 heads."""
    return _create("sima_large_24_p16", pretrained, **kwargs)


@register_model
def sima_nano_12_p8(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-N12/8: width 128, 12 blocks, 4 heads."""
    return _create("sima_nano_12_p8", pretrained, **kwargs)


@register_model
def sima_tiny_12_p8(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-T12/8: width 192, 12 blocks, 4 heads."""
    return _create("sima_tiny_12_p8", pretrained, **kwargs)


@register_model
def sima_small_12_p8(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-S12/8: width 384, 12 blocks, 8 heads."""
    return _create("sima_small_12_p8", pretrained, **kwargs)


@register_model
def sima_tiny_24_p8(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-T24/8: width 192, 24 blocks, 4 heads."""
    return _create("sima_tiny_24_p8", pretrained, **kwargs)


@register_model
def sima_small_24_p8(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-S24/8: width 384, 24 blocks, 8 heads."""
    return _create("sima_small_24_p8", pretrained, **kwargs)


@register_model
def sima_medium_24_p8(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-M24/8: width 512, 24 blocks, 8 heads."""
    return _create("sima_medium_24_p8", pretrained, **kwargs)


@register_model
def sima_large_24_p8(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on XCiT-L24/8: width 768, 24 blocks, 16 heads."""
    return _create("sima_large_24_p8", pretrained, **kwargs)
