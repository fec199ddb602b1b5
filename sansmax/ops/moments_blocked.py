"""The kernel of `Moments.of`: two passes over the tokens in blocks, so no copy of them is made.

The first pass sums, the second adds (x - mean)(x - mean)^T of a block at a time, centred in a buffer that stays in the
cache. The sum is symmetric: only the column blocks on and above its diagonal are multiplied, about two thirds of the
products at 384 channels. Backward needs the tokens and the two results,

    dX = X S + (dmean / n - mean S),   S = dscatter + dscatter^T

because the derivative of the scatter by the mean is zero.

Shapes: b images, n tokens, c channels; `mask` is True for real tokens.
"""

import itertools

import torch
from torch import Tensor

# tokens in work at a time: 1,024 of 384 channels in float32 are 1.5 MiB
BLOCK_TOKENS = {"cpu": 1024, "cuda": 65536}
# columns of a product; narrower ones waste less of the symmetric sum, and multiply slower
BLOCK_COLUMNS = 96


@torch.library.custom_op("sansmax::centred_moments", mutates_args=())
def centred_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean (b, c) and centred scatter (b, c, c) of the tokens `x` (b, n, c), in float32 or wider."""
    b, n, c = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, scatter = x.new_zeros((b, c), dtype=wide), x.new_zeros((b, c, c), dtype=wide)
    step = BLOCK_TOKENS.get(x.device.type, 4096)
    buffer, products = x.new_empty((min(step, n), c), dtype=wide), x.new_zeros((c, c), dtype=wide)
    for i in range(b):
        pieces = x[i].split(step)
        hidden = [None] * len(pieces) if mask is None else [~m.unsqueeze(-1) for m in mask[i].split(step)]
        count = x.new_full((), float(n), dtype=wide) if mask is None else mask[i].sum().to(wide)
        for piece, out in zip(pieces, hidden, strict=True):
            # padding may hold NaN, which a product by 0 would keep
            mean[i] += (piece if out is None else piece.masked_fill(out, 0.0)).sum(0, dtype=wide)
        mean[i] /= count.clamp_min(1.0)
        for piece, out in zip(pieces, hidden, strict=True):
            # cast first: the difference of the narrow type would be rounded
            x_c = buffer[: len(piece)].copy_(piece).sub_(mean[i])
            _multiply(x_c if out is None else x_c.masked_fill_(out, 0.0), products)
            # a product added to a large sum token by token loses digits: a million tokens lost four of seven
            scatter[i] += products
    _mirror(scatter)
    return mean, scatter


def _columns(c: int) -> list[tuple[int, int]]:
    blocks = max(1, round(c / BLOCK_COLUMNS))
    ends = [round(c * i / blocks) for i in range(blocks + 1)]
    return list(itertools.pairwise(ends))


def _multiply(x: Tensor, products: Tensor) -> None:
    for first, last in _columns(x.shape[-1]):
        torch.mm(x[:, first:last].mT, x[:, first:], out=products[first:last, first:])


def _mirror(scatter: Tensor) -> None:
    for first, last in _columns(scatter.shape[-1]):
        scatter[:, last:, first:last] = scatter[:, first:last, last:].mT


@centred_moments.register_fake
def _(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    b, _, c = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((b, c), dtype=wide), x.new_empty((b, c, c), dtype=wide)


def _setup(ctx, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    x, mask = inputs
    ctx.save_for_backward(x, mask, output[0])


def _backward(ctx, by_mean: Tensor, by_scatter: Tensor) -> tuple[Tensor, None]:
    x, mask, mean = ctx.saved_tensors
    with torch.autocast(x.device.type, enabled=False):
        both, shift = _slope(x, mask, mean, by_mean, by_scatter)
        # bfloat16 has the range of float32; float16 has not
        wide = both.dtype if x.dtype == torch.float16 else x.dtype
        real = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
        by_x = torch.baddbmm(shift.to(wide), real.to(wide), both.to(wide)).to(x.dtype)
        return by_x if mask is None else by_x.masked_fill(~mask.unsqueeze(-1), 0.0), None


def _slope(x: Tensor, mask: Tensor | None, mean: Tensor, by_mean: Tensor, by_scatter: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient by X as an affine map of X: its matrix, and what is added."""
    count = x.shape[1] if mask is None else mask.sum(-1, keepdim=True).clamp_min(1)
    both = by_scatter + by_scatter.mT
    return both, (by_mean / count).unsqueeze(-2) - mean.unsqueeze(-2) @ both


class MomentsBesideTokens(torch.autograd.Function):
    """`centred_moments` of the tokens, and the tokens themselves to be used from here on.

    Backward then has the gradient of both uses at once, and adds the moments' part in place to the other: one tensor of
    the size of the tokens, where two and their sum would be three. The other use must have made its gradient anew.
    """

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, scatter and the tokens."""
        mean, scatter = centred_moments(x, mask)
        ctx.save_for_backward(x, mask, mean)
        return mean, scatter, x.view_as(x)

    @staticmethod
    def backward(ctx, by_mean: Tensor, by_scatter: Tensor, by_x: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient by the tokens."""
        x, mask, mean = ctx.saved_tensors
        if mask is not None or torch.is_grad_enabled() or x.dtype != mean.dtype:
            return by_x + _backward(ctx, by_mean, by_scatter)[0], None
        both, shift = _slope(x, mask, mean, by_mean, by_scatter)
        return by_x.baddbmm_(x, both).add_(shift), None


centred_moments.register_autograd(_backward, setup_context=_setup)
