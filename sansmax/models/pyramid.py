"""Pyramids of transformer stages: timm's contract, for any stages.

A stage halves the image (the first one quarters it) and mixes its tokens: `stage(x)` takes a map (b, c_in, h, w) and
gives `(map, cls)`, its own map (b, c, h', w') and its class token (b, 1, c), or None where it has none. The last
stage's tokens, class token first, are normed and pooled for the classifier; the maps of all stages are what detection
and segmentation read.

Shapes: b images, n tokens, t tokens with the class token, c channels, (h, w) a map.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sansmax.models.contract import TokenNetwork, check_output_fmt, take_indices
from sansmax.models.rerun import rerun


class Stage(nn.Module):
    """What `Pyramid` asks of a stage; one that leaves its blocks to `run` can trade memory for time in training."""

    grad_checkpointing = False

    def forward(self, x: Float[Tensor, "b c_in h_in w_in"]) -> tuple[Tensor, Tensor | None]:
        """The map of this stage, and its class token if it has one."""
        raise NotImplementedError

    def run(self, blocks: Iterable[nn.Module], x: Tensor, *arguments: Any) -> Tensor:
        """The blocks one after the other; their activations made again in backward with `grad_checkpointing`."""
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = rerun(block, x, *arguments)
            else:
                x = block(x, *arguments)
        return x


class Pyramid(TokenNetwork):
    """Stages, a last norm and a classifier.

    `dims` and `reductions` are the channels of each stage's map and how many pixels one of its cells is wide;
    `num_prefix_tokens` is 1 where the last stage gives a class token. `global_pool` is "token" (that one), "avg",
    "max" or "avgmax" of the others, or "" for all tokens.

    Raises ValueError for another pooling, and for "token" without a class token.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        dims: Sequence[int],
        reductions: Sequence[int],
        norm: nn.Module,
        num_prefix_tokens: int = 1,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dims[-1], num_prefix_tokens, num_classes, in_chans, global_pool)
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        self.add_head(drop_rate, {"device": device, "dtype": dtype})

    # The forward pass

    def forward_features(self, x: Float[Tensor, "b in_chans h w"]) -> Float[Tensor, "b t c"]:
        """The last stage's tokens after the norm, class token first."""
        cls = None
        for stage in self.stages:
            x, cls = stage(x)
        return self.norm(_tokens(x, cls))

    def forward(self, x: Float[Tensor, "b in_chans h w"]) -> Tensor:
        """Logits of images."""
        return self.forward_head(self.forward_features(x))

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
        """Maps of the stages, and the last tokens unless `intermediates_only`.

        `indices` are the stages wanted, the last n if an int, None for all; `norm` applies the last norm to the last
        stage's map (the others have none). `output_fmt` is "NCHW" or "NLC"; with `return_prefix_tokens` each map comes
        with the prefix tokens of its stage (b, 0 or 1, c).

        Raises ValueError for another format.
        """
        check_output_fmt(output_fmt)
        wanted, last = take_indices(len(self.stages), indices)
        found, cls = [], None
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x, cls = stage(x)
            if i in wanted:
                found.append(self._intermediate(x, cls, i, norm, output_fmt, return_prefix_tokens))
        if intermediates_only:
            return found
        tokens = _tokens(x, cls)
        return (tokens if stop_early and last < len(self.stages) - 1 else self.norm(tokens)), found

    def _intermediate(self, x: Tensor, cls: Tensor | None, i: int, norm: bool, output_fmt: str, prefix: bool) -> Any:
        size, tokens = x.shape[-2:], _tokens(x, cls)
        tokens = self.norm(tokens) if norm and i == len(self.stages) - 1 else tokens
        n = 0 if cls is None else cls.shape[1]
        found = tokens[:, n:]
        if output_fmt == "NCHW":
            found = found.mT.unflatten(2, size).contiguous()
        return (found, tokens[:, :n]) if prefix else found

    # What timm asks for

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leaves out the stages that `forward_intermediates` with these indices does not need."""
        wanted, last = take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        if shorter:
            self.stages = self.stages[: last + 1]
            self.num_features = self.head_hidden_size = self.embed_dim = self.feature_info[last]["num_chs"]
            self.num_prefix_tokens = 0
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return wanted

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep the inputs of blocks only and compute their insides again."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Position tables and class tokens."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.rsplit(".", 1)[-1] in ("pos_embed", "cls_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates: whole stages if `coarse`, else each block by itself."""
        if coarse:
            return {"stem": r"^stages\.0\.(?:patch_embed|pos_embed)", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stages\.0\.(?:patch_embed|pos_embed)",
            "blocks": [
                (r"^stages\.(\d+)\.(?:patch_embed|pos_embed|cls_token)", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }


def _tokens(x: Float[Tensor, "b c h w"], cls: Float[Tensor, "b p c"] | None) -> Float[Tensor, "b t c"]:
    tokens = x.flatten(2).mT
    return tokens if cls is None else torch.cat((cls, tokens), dim=1)
