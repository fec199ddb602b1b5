"""Softmax attention, the baseline of every comparison: https://arxiv.org/abs/1706.03762, equation 1.

    out = softmax(Q K^T / sqrt(d)) V

Quadratic in the number of tokens in time; the memory depends on the kernel that PyTorch picks.

Shapes: b images, h heads, n tokens, d channels per head.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sansmax.ops.checks import check_choice, check_tokens
from sansmax.ops.moments import Weight

ORDERS = ("auto", "quadratic")


def softmax_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    *,
    mask: Weight = None,
    order: str = "auto",
) -> Float[Tensor, "b h n d"]:
    """Softmax attention by PyTorch's fused kernel.

    `mask` is True for real tokens (PyTorch's padding masks use the opposite). A floating mask is a weight per
    token: weight 0 is absent, 1 is present, and its gradient at 1 is the effect of removing the token. The output at
    masked tokens, and of an image without any real token, is zero. The only `order` is "quadratic".

    Raises ValueError for another order, shapes or types that do not fit, and no tokens.
    """
    check_tokens(mask, q=q, k=k, v=v)
    check_choice("order", order, ORDERS, "softmax attention")
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    if mask.dtype == torch.bool:
        real = mask[:, None, :, None]
        # the padding may hold anything, NaN included, and 0 * NaN is NaN
        q, k, v = (x.masked_fill(~real, 0.0) for x in (q, k, v))
        # an image without a real token would be softmax over nothing
        attended = mask | ~mask.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attended[:, None, None, :])
        return out.masked_fill(~real, 0.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.log()[:, None, None, :].to(q.dtype))
