"""Inverses of the landmarks' kernel matrix, as SOFT and SOFT++ compute them and exactly.

    newton_inverse           SOFT, https://arxiv.org/abs/2110.11945: Newton's iteration with a ridge
    newton_inverse_halved    SOFT++, https://arxiv.org/abs/2207.03341: Newton's iteration from a searched start
    cholesky_inverse         the inverse of A + ridge I itself

Newton's iteration Z <- 2 Z - Z A Z, from Z = alpha A, has not converged for small eigenvalues after 20 steps: it is
a spectral filter as much as an inverse, and weights trained with one need exactly that one. Everything runs in
float32 or wider, whatever the autocast type.

Shapes: b images, h heads, m landmarks; A is symmetric with entries in [0, 1].
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sansmax.ops.moments import at_least_float32


def newton_inverse(a: Float[Tensor, "*b m m"], steps: int = 20, ridge: float = 0.01) -> Float[Tensor, "*b m m"]:
    """SOFT's inverse: `steps` of Newton's iteration on A' = A + ridge I, from alpha A', each matrix by itself.

    alpha = 1.8 / (largest row sum of A, without the ridge)^2. The gradient is -Z^T G Z^T from the result Z, finished
    or not, as in the published code; where the iteration has not converged it differs from the derivative of the
    steps.

    Raises ValueError for a ridge outside 0 to 0.05: alpha does not count it, and a larger one makes the steps diverge.
    """
    if not 0 <= ridge <= 0.05:
        raise ValueError(
            f"ridge of Newton's iteration must be between 0 and 0.05, got {ridge}; use the Cholesky inverse for another"
        )
    with torch.autocast(a.device.type, enabled=False):
        a = at_least_float32(a)
        if torch.compiler.is_exporting():
            # the same value and gradient without a function of its own, which PyTorch 2.8 loses in a graph
            z = _NewtonInverse.forward(a.detach(), steps, ridge)
            return z - z @ (a - a.detach()) @ z
        return _NewtonInverse.apply(a, steps, ridge)


class _NewtonInverse(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, steps: int, ridge: float) -> Tensor:
        alpha = 1.8 / a.sum(-1).amax(-1).square()
        a = a + ridge * _eye_like(a)
        return _newton(a, alpha[..., None, None] * a, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, float], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            return -(z.mT @ grads[0] @ z.mT), None, None


def newton_inverse_halved(a: Float[Tensor, "b h m m"], steps: int = 20) -> Float[Tensor, "b h m m"]:
    """SOFT++'s inverse: `steps` of Newton's iteration on A, from alpha A, with one alpha for the heads of an image.

    alpha = 2 / (largest row sum)^2, halved at most 10 times while |I - alpha A A|_1 > 1.01. The published code takes
    the row sum and the norm over the whole batch, so its result depends on the other images; this one equals it for
    a batch of one. Gradients run through the steps and alpha. Near A = I the iteration returns 0, as published:
    alpha = 2 makes the first step 2 (2 I) - 4 I.
    """
    with torch.autocast(a.device.type, enabled=False):
        a = at_least_float32(a)
        alpha = 2 / a.sum(-1).amax((-2, -1)).square()[:, None, None, None]
        with torch.no_grad():
            square, eye = a @ a, _eye_like(a)
            halved = torch.ones_like(alpha)
            for _ in range(10):
                norm = (eye - alpha * halved * square).abs().sum(-2).amax((-2, -1))[:, None, None, None]
                halved = torch.where(norm > 1.01, halved / 2, halved)
        return _newton(a, alpha * halved * a, steps)


def cholesky_inverse(a: Float[Tensor, "*b m m"], ridge: float = 0.01) -> Float[Tensor, "*b m m"]:
    """The exact inverse of A + ridge I, from its Cholesky factor.

    A matrix that cannot be factored (a ridge below the rounding of a singular A: about m eps) gives NaN, and spares
    the others: an error would have to wait for the device. Kernel matrices of landmarks that nearly coincide are
    singular to float32; pass them in float64, made from landmarks in float64, where the ridge is to be small.
    """
    with torch.autocast(a.device.type, enabled=False):
        a = at_least_float32(a)
        factor, info = torch.linalg.cholesky_ex(a + ridge * _eye_like(a))
        z = torch.cholesky_inverse(factor)
        return torch.where((info == 0)[..., None, None], z, torch.full_like(z, float("nan")))


def _newton(a: Tensor, z: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        z = 2 * z - z @ a @ z
    return z


def _eye_like(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
