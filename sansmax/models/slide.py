"""Slide classifiers: a bag of features with coordinates in, logits out; any number of tokens.

    features -> Linear (-> + positions) -> blocks -> norm -> mean over the tokens -> Linear

The head is linear and the pooling a mean, so the logits are the mean of one logit per token. Nothing in the network
depends on the number of tokens, and a bag of which every token is there twice gives the same logits.

Beside `forward` there are the pieces that a stream runs in chunks: `embed_tokens`, the blocks' two phases,
`summarise_pool` and `read_out`.

Features come from a large encoder already and labelled slides are few, so the networks are small: "small" is two
blocks of 256 channels whose MLP is twice as wide (1.1 million parameters beside the first layer, half of
TransMIL's); "base" is four blocks of 512 with MLPs four times as wide, for sets of thousands of slides.

Shapes: b bags, n tokens, t tokens of several bags side by side, c channels, d_in channels of the features.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sansmax.errors import InputError
from sansmax.models.blocks import Block
from sansmax.models.contract import start_linear
from sansmax.models.entries import SEQNORM, SIMA, SOFT
from sansmax.models.gated import GatedPool, GatedScores
from sansmax.models.mlp import Mlp
from sansmax.models.ragged import run_ragged, side_by_side, split_weights
from sansmax.models.slide_positions import centred_coords, sincos_positions
from sansmax.models.slide_soft import MeanSoftAttention
from sansmax.ops.moments import Mean, Weight, without_padding

__all__ = ["GatedSlideNetwork", "SlideNetwork", "reads_features"]

POSITIONS = ("none", "sincos")
Coords = Float[Tensor, "b n 2"] | None


def reads_features(network: nn.Module) -> bool:
    """Whether a network takes bags of features, and not images."""
    return isinstance(network, FeatureNetwork)


class FeatureNetwork(nn.Module):
    """What every slide classifier has: a first layer, blocks (maybe none), a pooling that merges, and a linear head.

    A subclass says how tokens are pooled: `per_token`, what the pooling needs of each token, and `pooled`, the state of
    a set of tokens made of that.
    """

    def __init__(self, in_features: int, num_classes: int, embed_dim: int, drop_rate: float, factory: dict) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("embed_dim", embed_dim)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.in_features, self.num_classes = in_features, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens, self.grad_checkpointing = 0, False
        self.embed = nn.Linear(in_features, embed_dim, **factory)
        self.blocks = nn.ModuleList()
        self.head_drop = nn.Dropout(drop_rate)

    def add_head(self, factory: dict) -> None:
        """The classifier, and the start of all linear layers."""
        self.head = nn.Linear(self.embed_dim, self.num_classes, **factory) if self.num_classes > 0 else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                start_linear(module)

    def forward(
        self,
        features: Float[Tensor, "b n d_in"],
        coords: Coords = None,
        mask: Weight = None,
        lengths: Sequence[int] | None = None,
    ) -> Float[Tensor, "k num_classes"]:
        """Logits of bags, one row each.

        `coords` (b, n, 2) are upper left corners in sides of a tile, from any origin. `mask` (b, n) is True for real
        tokens, or a weight per token whose gradient at 1 is the effect of removing the token. With `lengths` the
        features (1, t, d_in) are several bags side by side.

        Raises InputError for features of another width, lengths that do not add up, and an empty bag.
        """
        bags = self.check_bags(features, lengths)
        if coords is not None:
            coords = self.centred(coords, mask, bags)
        x = self.embed_tokens(without_padding(features, mask), coords)
        for block in self.blocks:
            step = partial(run_ragged, cast(Block, block), lengths=bags) if bags else block
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(step, x, mask=mask, use_reentrant=False)
            else:
                x = step(x, mask=mask)
        return self.read_out(self.summarise_bags(cast(Tensor, x), mask, bags))

    def check_bags(self, features: Tensor, lengths: Sequence[int] | None) -> list[int]:
        """The lengths of bags side by side; raises InputError for what `forward` cannot take."""
        if features.shape[-1] != self.in_features:
            raise InputError(
                f"the network reads features of {self.in_features} channels, these have {features.shape[-1]}; "
                "use the encoder that the network was trained with, or build it with in_features="
                f"{features.shape[-1]}"
            )
        if features.shape[1] == 0:
            raise InputError("a bag without tokens has no logits; leave it out")
        if lengths is None:
            return []
        bags = [int(n) for n in lengths]
        if features.shape[0] != 1 or sum(bags) != features.shape[1] or min(bags, default=0) < 1:
            raise InputError(
                f"lengths {bags if len(bags) < 8 else f'of {len(bags)} bags, {sum(bags)} tokens'} must be at least 1 "
                f"each and add up to the tokens of one row, features are {tuple(features.shape)}"
            )
        return bags

    def centred(self, coords: Tensor, mask: Weight, bags: list[int]) -> Tensor:
        """Coordinates from the middle of each bag."""
        if not bags:
            return centred_coords(coords, mask)
        each = zip(coords.split(bags, dim=1), split_weights(mask, bags), strict=True)
        return torch.cat([centred_coords(xy, m) for xy, m in each], dim=1)

    # The pieces that a stream runs, in this order.

    @property
    def stream_obstacle(self) -> str | None:
        """Why the network cannot run in chunks of tokens; None where it can."""
        return None

    def embed_prefix(self) -> None:
        """No tokens stand before those of the bag."""
        return

    def embed_tokens(self, features: Float[Tensor, "b n d_in"], coords: Coords = None) -> Float[Tensor, "b n c"]:
        """Tokens of a chunk of a bag; `coords` are taken from the middle of the whole bag (`centred_coords`)."""
        return self.embed(features)

    def per_token(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, ...]:
        """What the pooling needs of each token."""
        raise NotImplementedError

    def pooled(self, parts: tuple[Tensor, ...], weight: Weight) -> Any:
        """The state of pooling of one set of tokens; states of disjoint sets merge."""
        raise NotImplementedError

    def summarise_pool(self, x: Float[Tensor, "b n c"], weight: Weight = None, prefix: bool = False) -> Any:
        """What the head needs to know of tokens after the last block."""
        assert not prefix
        return self.pooled(self.per_token(x), weight)

    def summarise_bags(self, x: Float[Tensor, "b n c"], weight: Weight, lengths: list[int]) -> Any:
        """`summarise_pool` of bags side by side, one row each."""
        if not lengths:
            return self.summarise_pool(x, weight)
        parts = zip(*(part.split(lengths, dim=1) for part in self.per_token(x)), strict=True)
        return side_by_side([self.pooled(p, w) for p, w in zip(parts, split_weights(weight, lengths), strict=True)])

    def read_out(self, summary: Any, pre_logits: bool = False) -> Float[Tensor, "b num_classes"]:
        """Logits (or features, with `pre_logits`) from what `summarise_pool` collected over all tokens."""
        x = self.head_drop(summary.value().to(self.embed.weight.dtype))
        # few tokens: autocast would save no time and cost digits of the logits
        with torch.autocast(x.device.type, enabled=False):
            return x if pre_logits else self.head(x)

    # What timm asks of a network.

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, none for 0 classes; the pooling stays."""
        del global_pool
        self.num_classes = num_classes
        head = nn.Identity()
        if num_classes > 0:
            head = nn.Linear(self.embed_dim, num_classes).to(self.embed.weight)
            start_linear(head)
        self.head = head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the inputs of blocks only, and compute them again in backward."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not to decay, beside gains and biases."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups parameters by depth."""
        return {"stem": r"^embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


class SlideNetwork(FeatureNetwork):
    """A transformer over the tokens of a bag with `attention` "seqnorm", "sima", "soft", "softmax" or another.

    Arguments are named as in timm's vision transformer. `pos_embed` "sincos" adds the place of each token
    (`sansmax.models.slide_positions`) where coordinates are given; by default, "none", a bag is a set: where a piece
    of tissue lies on its glass, and which side is up, is chance. `attn_options` go to the layer of `attention`.

    Raises ValueError for an attention or positions that do not exist, and sizes that do not fit.
    """

    def __init__(
        self,
        *,
        in_features: int = 1024,
        num_classes: int = 2,
        embed_dim: int = 256,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        attention: str = "seqnorm",
        attn_order: str = "auto",
        attn_options: Mapping[str, Any] | None = None,
        pos_embed: str = "none",
        qkv_bias: bool = False,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_features, num_classes, embed_dim, drop_rate, factory)
        if pos_embed not in POSITIONS:
            raise InputError(f"pos_embed must be one of {', '.join(POSITIONS)}, got {pos_embed!r}")
        if pos_embed == "sincos" and embed_dim % 4:
            raise InputError(f"sincos positions need an embed_dim that is a multiple of 4, got {embed_dim}")
        self.attention, self.pos_embed = attention, pos_embed
        norm = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        for i in range(depth):
            block = Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                init_values=init_values,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
                norm_layer=norm,
                act_layer=act_layer,
                mlp_layer=Mlp,
                attention=attention,
                order=attn_order,
                attn_options=attn_options,
                device=device,
                dtype=dtype,
            )
            if attention == "soft":
                options = {"qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, "order": attn_order, **factory}
                block.attn = MeanSoftAttention(embed_dim, num_heads, **options, **(attn_options or {}))
            self.blocks.append(block)
        self.norm = norm(embed_dim, **{k: v for k, v in factory.items() if v is not None})
        self.add_head(factory)

    @property
    def stream_obstacle(self) -> str | None:
        """Why the network cannot run in chunks of tokens; None where it can."""
        if not all(cast(Block, block).streams for block in self.blocks):
            return f"{self.attention} attention has no summary of fixed size that chunks of tokens could share"
        return None

    def embed_tokens(self, features: Float[Tensor, "b n d_in"], coords: Coords = None) -> Float[Tensor, "b n c"]:
        """Tokens of a chunk of a bag; `coords` are taken from the middle of the whole bag (`centred_coords`)."""
        # blocks add to them: autocast would leave the tokens, and so all sums of blocks, in 16 bit
        x = self.embed(features).to(self.embed.weight.dtype)
        if coords is None or self.pos_embed == "none":
            return x
        return x + sincos_positions(coords, self.embed_dim).to(x.dtype)

    def per_token(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, ...]:
        """The tokens after the last norm."""
        return (self.norm(x),)

    def pooled(self, parts: tuple[Tensor, ...], weight: Weight) -> Mean:
        """Count and sum of the tokens."""
        return Mean.of(parts[0], weight)


class GatedSlideNetwork(FeatureNetwork):
    """Gated attention pooling (ABMIL, https://arxiv.org/abs/1802.04712, equation 9), the baseline of the field.

    A layer with ReLU, a score per token, the mean of the tokens weighted by the softmax of the scores, and a linear
    head. Coordinates are not used. `attn_dim` is the width of the hidden layer of the scores.
    """

    def __init__(
        self,
        *,
        in_features: int = 1024,
        num_classes: int = 2,
        embed_dim: int = 512,
        attn_dim: int = 256,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_features, num_classes, embed_dim, drop_rate, factory)
        self.proj_drop = nn.Dropout(proj_drop_rate)
        self.gate = GatedScores(embed_dim, attn_dim, **factory)
        self.add_head(factory)

    def embed_tokens(self, features: Float[Tensor, "b n d_in"], coords: Coords = None) -> Float[Tensor, "b n c"]:
        """Tokens of a chunk of a bag."""
        return self.proj_drop(self.embed(features).relu())

    def per_token(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, ...]:
        """The tokens, and their scores (b, n, 1)."""
        return x, self.gate(x)

    def pooled(self, parts: tuple[Tensor, ...], weight: Weight) -> GatedPool:
        """The sums of the softmax."""
        return GatedPool.of(parts[0], parts[1].squeeze(-1), weight)


ABMIL = {"license": "apache-2.0", "paper_name": "Attention-based Deep Multiple Instance Learning"}


def _cfg(paper: dict[str, Any]) -> dict[str, Any]:
    # no picture goes in: there is no size, mean or crop of one
    return {"url": "", "num_classes": 2, "input_size": None, "first_conv": "embed", "classifier": "head", **paper}


default_cfgs = generate_default_cfgs(
    {
        "seqnorm_slide_small.untrained": _cfg(SEQNORM),
        "seqnorm_slide_base.untrained": _cfg(SEQNORM),
        "sima_slide_small.untrained": _cfg(SIMA),
        "soft_slide_small.untrained": _cfg(SOFT),
        "softmax_slide_small.untrained": _cfg({"paper_ids": "arXiv:1706.03762"}),
        "abmil_slide_small.untrained": _cfg({**ABMIL, "paper_ids": "arXiv:1802.04712"}),
    }
)


def _create(network: Callable[..., nn.Module], variant: str, pretrained: bool, **arguments: Any) -> nn.Module:
    return build_model_with_cfg(network, variant, pretrained, kwargs_filter=("global_pool",), **arguments)


@register_model
def seqnorm_slide_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """SeqNorm over bags of features: width 256, 2 layers, 4 heads."""
    return _create(SlideNetwork, "seqnorm_slide_small", pretrained, **kwargs)


@register_model
def seqnorm_slide_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """SeqNorm over bags of features: width 512, 4 layers, 8 heads."""
    arguments = {"embed_dim": 512, "depth": 4, "num_heads": 8, "mlp_ratio": 4.0}
    return _create(SlideNetwork, "seqnorm_slide_base", pretrained, **{**arguments, **kwargs})


@register_model
def sima_slide_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA over bags of features: width 256, 2 layers, 4 heads; its output does not shrink with the bag."""
    options = {"reference_tokens": 1, **(kwargs.pop("attn_options", None) or {})}
    return _create(SlideNetwork, "sima_slide_small", pretrained, attention="sima", attn_options=options, **kwargs)


@register_model
def soft_slide_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """SOFT over bags of features: width 256, 2 layers, 4 heads, 49 landmarks pooled from the bag."""
    return _create(SlideNetwork, "soft_slide_small", pretrained, **{"attention": "soft", **kwargs})


@register_model
def softmax_slide_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """The baseline with softmax attention: width 256, 2 layers, 4 heads."""
    return _create(SlideNetwork, "softmax_slide_small", pretrained, **{"attention": "softmax", **kwargs})


@register_model
def abmil_slide_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """Gated attention pooling: width 512, scores of 256 channels."""
    return _create(GatedSlideNetwork, "abmil_slide_small", pretrained, **kwargs)
