"""What timm asks of every network of tokens, whatever its blocks: pooling, classifier, and which maps to take.

Shapes: b images, t tokens with the prefix tokens first, c channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.pool1d import global_pool_nlc
from timm.layers.weight_init import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

POOLS = ("token", "avg", "avgmax", "max", "")


class TokenNetwork(nn.Module):
    """A network whose `forward_features` gives tokens, which are pooled for a classifier.

    `global_pool` is "token" (the first prefix token), "avg", "max" or "avgmax" of the tokens behind the prefix, or ""
    for all tokens. A subclass builds its layers and then calls `add_head`, so that the head's names come last.

    Raises ValueError for another pooling, and for "token" without prefix tokens.
    """

    def __init__(
        self, num_features: int, num_prefix_tokens: int, num_classes: int, in_chans: int, global_pool: str
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.num_prefix_tokens = num_classes, in_chans, num_prefix_tokens
        self.num_features = self.head_hidden_size = self.embed_dim = num_features
        self.global_pool = self._checked_pool(global_pool)
        self.grad_checkpointing = False

    def add_head(self, drop_rate: float, factory: dict[str, Any]) -> None:
        """Dropout and the classifier."""
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(factory)

    def _new_head(self, factory: dict[str, Any]) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, self.num_classes, **factory)
        start_linear(head)
        return head

    def _checked_pool(self, global_pool: str) -> str:
        allowed = POOLS if self.num_prefix_tokens else POOLS[1:]
        if global_pool not in allowed:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, allowed))}, got {global_pool!r}")
        return global_pool

    def forward_head(self, x: Float[Tensor, "b t c"], pre_logits: bool = False) -> Tensor:
        """Logits of the tokens that `forward_features` gives, or the pooled features with `pre_logits`."""
        x = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        if pre_logits or not isinstance(self.head, nn.Linear):
            return x
        # few tokens: autocast would save no time and cost digits of the logits
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.to(self.head.weight.dtype))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier (none for 0 classes), and another pooling if given."""
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        where = next(self.parameters())
        self.head = self._new_head({"device": where.device, "dtype": where.dtype})


def start_linear(layer: nn.Linear) -> None:
    """The start of the published networks: weights N(0, 0.02) cut off at 2 in absolute value, biases 0."""
    trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def take_indices(depth: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Numbers of the maps wanted, the last n if an int and all for None, and the largest of them."""
    return feature_take_indices(depth, list(indices) if isinstance(indices, Sequence) else indices)


def check_output_fmt(output_fmt: str) -> None:
    """Raises ValueError unless maps are wanted as "NCHW" or "NLC"."""
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f'output_fmt must be "NCHW" or "NLC", got {output_fmt!r}')
