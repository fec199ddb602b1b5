"""What every attention function demands of its arguments; a wrong one is a ValueError that says what to do.

Shapes: b images, h heads, n tokens, d channels per head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tokens(mask: Tensor | None, **tensors: Tensor) -> None:
    """Raises ValueError unless the named tensors are (b, h, n, d) alike, with tokens, and `mask` is (b, n)."""
    (first, like), *others = tensors.items()
    if like.ndim != 4:
        raise ValueError(f"{first} must be (batch, heads, tokens, head_dim), got shape {tuple(like.shape)}")
    if not like.is_floating_point():
        raise ValueError(f"{first} must be of a floating type, got {like.dtype}; convert it with .float()")
    for name, x in others:
        if x.shape != like.shape:
            raise ValueError(
                f"{first} and {name} must have the same shape (batch, heads, tokens, head_dim), "
                f"got {tuple(like.shape)} and {tuple(x.shape)}"
            )
        if x.dtype != like.dtype:
            raise ValueError(f"{first} and {name} must have the same dtype, got {like.dtype} and {x.dtype}")
    if like.shape[-2] == 0:
        raise ValueError(f"{first} has no tokens, shape {tuple(like.shape)}; attention needs at least one")
    check_mask(mask, like.shape[0], like.shape[-2])


def check_layer(x: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError unless there are tokens `x` (b, n, c) and `mask` fits them."""
    if x.ndim != 3:
        raise ValueError(f"a layer takes tokens (batch, tokens, channels), got shape {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"there are no tokens, shape {tuple(x.shape)}; attention needs at least one")
    check_mask(mask, x.shape[0], x.shape[1])


def check_mask(mask: Tensor | None, b: int, n: int) -> None:
    """Raises ValueError unless `mask` is None, or boolean or floating, with one value per token."""
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"mask must be boolean (True = real token) or a floating weight per token, got {mask.dtype}; "
            "turn a 0/1 mask with 1 = real token into one with mask.bool()"
        )
    if mask.shape != (b, n):
        raise ValueError(
            f"mask must have one value per image and token, ({b}, {n}), got {tuple(mask.shape)}; "
            "True = real token, for all heads alike"
        )


# by the mechanism's own kernel in blocks of tokens, or by plain PyTorch, through which any derivative goes
IMPLEMENTATIONS = ("auto", "blocks", "torch")


def check_num_heads(width: int, num_heads: int) -> None:
    """Raises ValueError unless the heads divide the width."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"embed_dim {width} is not divisible by num_heads {num_heads}")


def check_choice(name: str, value: str, allowed: Sequence[str], of: str) -> None:
    """Raises ValueError unless `value` is one of `allowed`; `of` names the mechanism."""
    if value not in allowed:
        raise ValueError(f"{name} of {of} must be one of {', '.join(allowed)}, got {value!r}")
