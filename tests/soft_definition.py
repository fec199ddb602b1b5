"""SOFT attention by its definition, every way to compute it, and draws to compare them on."""

import pytest
import torch

from sansmax.ops.soft import SoftState, soft_attend, soft_attention

B, HEADS, D, M = 3, 2, 7, 5
# SOFT, SOFT++, the first published Tiny, and exact inverses
VARIANTS = {
    "soft": {"inverse": "newton"},
    "soft++": {"inverse": "halved", "normalized": True},
    "soft tiny": {"inverse": "halved"},
    "exact": {"inverse": "cholesky"},
    "exact++": {"inverse": "cholesky", "normalized": True},
}
WAYS = ("blocks", "torch", "quadratic", "state", "plain state")

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_way = pytest.mark.parametrize("way", WAYS)
every_kind = pytest.mark.parametrize("kind", [None, "mask", "weight"])
some_kind = pytest.mark.parametrize("kind", ["mask", "weight"])


def inverse_by_definition(a, inverse):
    """Of the kernels of one image, (h, m, m), as published; the gradient of Newton's is that of an inverse."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    if inverse == "cholesky":
        return torch.linalg.inv(a + 0.01 * eye)
    p = a
    if inverse == "newton":
        p = (a + 0.01 * eye).detach()
        z = 1.8 / a.detach().sum(-1).amax(-1)[:, None, None] ** 2 * p
    else:
        alpha = 2 / a.sum(-1).max() ** 2
        for _ in range(10):
            if (eye - a @ (alpha * a)).abs().sum(-2).max() <= 1.01:
                break
            alpha = alpha / 2
        z = alpha * a
    for _ in range(20):
        z = 2 * z - z @ p @ z
    return z - z @ (a - a.detach()) @ z if inverse == "newton" else z


def kernel(a, b):
    return torch.exp(-(a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1) / (2 * a.shape[-1] ** 0.5))


def definition(q, v, landmarks, weight=None, landmark_mask=None, inverse="newton", normalized=False):
    """Image by image the slow way, an explicit n x n matrix between the real tokens."""
    images = []
    for i in range(q.shape[0]):
        w = q.new_ones(q.shape[2]) if weight is None else weight[i].to(q.dtype)
        real = w != 0
        points = landmarks[i] if landmark_mask is None else landmarks[i][:, landmark_mask[i]]
        p, a = kernel(q[i][:, real], points), kernel(points, points)
        z = inverse_by_definition(a, inverse)
        if normalized:
            scale = a.sum(-1) ** -0.5
            z = scale.unsqueeze(-1) * z * scale.unsqueeze(-2)
        found = ((p @ z @ p.mT) * w[real]) @ v[i][:, real]
        images.append(torch.zeros_like(v[i]).index_copy(1, real.nonzero()[:, 0], found))
    return torch.stack(images)


def attend(way, q, v, landmarks, weight=None, **options):
    if way in ("blocks", "torch"):
        return soft_attention(q, v, landmarks, mask=weight, impl=way, **options)
    if way == "quadratic":
        return soft_attention(q, v, landmarks, mask=weight, order="quadratic", **options)
    impl = "torch" if way == "plain state" else "auto"
    state = SoftState.of(q, v, landmarks, weight, impl=impl)
    return soft_attend(state, q, landmarks, mask=weight, impl=impl, **options)


def draw(n=13, m=M, b=B, dtype=torch.float64):
    q, v = (torch.randn(b, HEADS, n, D, dtype=dtype, requires_grad=True) for _ in "qv")
    return q, v, torch.randn(b, HEADS, m, D, dtype=dtype, requires_grad=True)


def draw_weight(kind, n=13):
    if kind == "mask":
        # never without a real token: that has a test of its own
        return (torch.rand(B, n) < 0.6).index_fill(1, torch.tensor(0), True)
    return torch.rand(B, n, dtype=torch.float64, requires_grad=True) if kind == "weight" else None


def gradients(out, by, inputs):
    return torch.autograd.grad(out, inputs, by, allow_unused=True, materialize_grads=True)


def compare(assert_same, found, expected, inputs, scale=None):
    assert_same(found, expected, "output", scale)
    by = torch.randn_like(found)
    for i, (a, b) in enumerate(zip(*(gradients(y, by, inputs) for y in (found, expected)), strict=True)):
        assert_same(a, b, f"gradient of input {i}", scale)
