"""Inverses of the landmarks' kernel: as published, value and gradient, and the exact one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from apart import assert_nothing_wrong
from torch.autograd import gradcheck, gradgradcheck

from sansmax.ops.inverse import cholesky_inverse, newton_inverse, newton_inverse_halved

GOLDEN = Path(__file__).parent / "golden" / "newton_units.npz"
B, HEADS, M = 3, 2, 7
INVERSES = {"newton": newton_inverse, "halved": newton_inverse_halved, "cholesky": cholesky_inverse}

every_inverse = pytest.mark.parametrize("inverse", INVERSES.values(), ids=INVERSES)


def draw(b=B, m=M, spread=1.0, dtype=torch.float64):
    """A kernel of random points, the nearer the smaller their spread."""
    points = spread * torch.randn(b, HEADS, m, 5, dtype=torch.float64)
    distance = (points.unsqueeze(-2) - points.unsqueeze(-3)).square().sum(-1)
    return (-distance / 2).exp().to(dtype)


def eye(m, dtype=torch.float64):
    return torch.eye(m, dtype=dtype)


def newton(a, z, steps):
    """The iteration of one matrix."""
    for _ in range(steps):
        z = 2 * z - z @ a @ z
    return z


def halved(a, steps=20):
    """SOFT++'s start as published, for one image: a loop that looks at its numbers."""
    alpha = 2 / a.sum(-1).max() ** 2
    for _ in range(10):
        if (eye(a.shape[-1], a.dtype) - a @ (alpha * a)).abs().sum(-2).max() <= 1.01:
            break
        alpha = alpha / 2
    return newton(a, alpha * a, steps)


@pytest.mark.parametrize("case", ["n9", "ill", "ones", "eye"])
@pytest.mark.parametrize("kind", ["soft", "norm"])
def test_values_and_gradients_are_those_of_the_published_code(case, kind):
    golden = {name: torch.from_numpy(x).double() for name, x in np.load(GOLDEN).items()}
    a = golden[f"{case}.K"].requires_grad_()
    found = {"soft": newton_inverse, "norm": newton_inverse_halved}[kind](a)
    (grad,) = torch.autograd.grad((found * golden[f"{case}.R"]).sum(), a)
    for x, y in ((found, golden[f"{case}.{kind}.inv64"]), (grad, golden[f"{case}.{kind}.gradK"])):
        assert (x - y).abs().max() <= 1e-9 * y.abs().max()


def test_the_start_is_halved_for_each_image_by_itself(assert_same):
    # apart, near and nearly the same: different numbers of halvings
    a = torch.cat([draw(1, spread=s) for s in (3.0, 1.0, 0.1)]).requires_grad_()
    found, expected = newton_inverse_halved(a), torch.stack([halved(x) for x in a])
    by = torch.randn_like(a)
    assert_same(found, expected)
    assert_same(*(torch.autograd.grad(z, a, by)[0] for z in (found, expected)), "gradient")


@every_inverse
def test_images_do_not_see_each_other(inverse, assert_same):
    a = torch.cat([draw(1, spread=s) for s in (3.0, 1.0, 0.1)])
    together = inverse(a)
    for i in range(3):
        # beside the image's own size
        assert_same(together[i : i + 1], inverse(a[i : i + 1]))


@pytest.mark.parametrize("steps", [0, 3, 20])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.05])
def test_newton_takes_the_steps_and_the_ridge_that_are_asked_for(steps, ridge, assert_same):
    a = draw()
    alpha = 1.8 / a.sum(-1).amax(-1) ** 2
    ridged = a + ridge * eye(M)
    expected = [newton(r, x * r, steps) for r, x in zip(ridged.flatten(0, 1), alpha.flatten(), strict=True)]
    assert_same(newton_inverse(a, steps, ridge), torch.stack(expected).view_as(a))
    if steps:
        expected = torch.stack([halved(x, steps) for x in a])
        assert_same(newton_inverse_halved(a, steps), expected)


def test_the_gradient_of_newton_is_that_of_an_inverse_even_where_it_has_not_converged(assert_same):
    # not quite symmetric, so that a transposition shows
    a, by = draw(spread=0.3), torch.randn(B, HEADS, M, M, dtype=torch.float64)
    a = (a + 0.1 * torch.rand_like(a)).requires_grad_()
    z = newton_inverse(a, steps=4)
    (found,) = torch.autograd.grad(z, a, by)
    assert_same(found, -(z.mT @ by @ z.mT).detach())
    # it has not converged
    assert (z @ (a + 0.01 * eye(M, a.dtype)) - eye(M)).abs().max() > 0.1


def test_gradients_equal_finite_differences_where_the_iteration_converges():
    a = draw(1, 3, spread=2.0).requires_grad_()
    for inverse in INVERSES.values():
        if inverse is not newton_inverse_halved:
            # a Cholesky factor reads half of its matrix
            assert gradcheck(lambda a, inverse=inverse: inverse((a + a.mT) / 2), a)
            assert gradgradcheck(lambda a, inverse=inverse: inverse((a + a.mT) / 2), a)
    # short of convergence too, as it differentiates the steps
    a = draw(1, 3, spread=0.7).requires_grad_()
    assert gradcheck(lambda a: newton_inverse_halved(a, 3), a)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.3])
def test_cholesky_is_the_exact_inverse(ridge, assert_same):
    a = draw().requires_grad_()
    found, expected = cholesky_inverse(a, ridge), torch.linalg.inv(a + ridge * eye(M))
    by = torch.randn_like(a)
    assert_same(found, expected)
    # the factor reads half of a symmetric matrix: compare along symmetric directions
    grads = [torch.autograd.grad(z, a, by)[0] for z in (found, expected)]
    assert_same(*(g + g.mT for g in grads), "gradient")


def test_cholesky_of_a_singular_matrix_is_nan_and_spares_the_others(assert_same):
    a = draw(dtype=torch.float32)
    # a negative eigenvalue, as rounding leaves in a kernel of points that coincide
    a[1, 0] = 1 - 1e-3 * eye(M, torch.float32)
    z = cholesky_inverse(a, 0.0)
    assert z[1, 0].isnan().all()
    assert z[1, 1].isfinite().all()
    assert_same(z[[0, 2]], cholesky_inverse(a[[0, 2]], 0.0))
    assert cholesky_inverse(a, 0.01).isfinite().all()


@every_inverse
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_is_as_accurate_as_the_same_in_float32(inverse, dtype, assert_as_accurate):
    a = draw(dtype=dtype)
    # one image at a time in plain PyTorch, in float32
    plain = {
        newton_inverse: lambda a: torch.stack(
            [newton(r, 1.8 / (r.sum(-1).max() - 0.01) ** 2 * r, 20) for r in (a + 0.01 * eye(M, a.dtype)).flatten(0, 1)]
        ).view_as(a),
        newton_inverse_halved: lambda a: torch.stack([halved(x) for x in a]),
        cholesky_inverse: lambda a: torch.linalg.inv(a + 0.01 * eye(M, a.dtype)),
    }[inverse]
    found = inverse(a)
    assert found.dtype == torch.float32
    assert_as_accurate(found, plain(a.float()), inverse(a.double()))


@every_inverse
def test_autocast_does_not_lower_the_precision(inverse):
    a = draw(dtype=torch.float32).requires_grad_()
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            z = inverse(a)
            # backward runs under autocast too, where a network is checkpointed; the formula of newton is its own
            results.append((z, torch.autograd.grad(z.sum(), a)[0]) if inverse is newton_inverse else (z,))
    for x, y in zip(*results, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)


@every_inverse
def test_one_landmark_and_landmarks_far_apart(inverse, assert_same):
    expected = {newton_inverse: 1 / 1.01, newton_inverse_halved: 0.0, cholesky_inverse: 1 / 1.01}[inverse]
    for a in (
        torch.ones(B, HEADS, 1, 1, dtype=torch.float64),
        eye(M).expand(B, HEADS, M, M),
    ):
        found = inverse(a)
        assert_same(found, expected * a, scale=1.0)


def test_a_ridge_that_would_make_newton_diverge_is_an_error():
    with pytest.raises(ValueError, match=r"ridge of Newton's iteration must be between 0 and 0.05, got 0.3; use"):
        newton_inverse(draw(), ridge=0.3)
    # the largest that is allowed, in the worst case
    assert newton_inverse(eye(M).expand(B, HEADS, M, M), 20, 0.05).isfinite().all()


EXPORTED = """
import json
import torch
from sansmax.ops.inverse import newton_inverse

class Inverse(torch.nn.Module):
    def forward(self, a):
        return newton_inverse(a)

torch.manual_seed(0)
points = 0.5 * torch.randn(2, 3, 9, 4, dtype=torch.float64)
a = torch.exp(-torch.cdist(points, points) ** 2 / 2)
program = torch.export.export(Inverse(), (a,)).module()
results = []
for f in (program, newton_inverse):
    x = a.clone().requires_grad_()
    z = f(x)
    results.append((z, torch.autograd.grad(z, x, points @ points.mT)[0]))
wrong = {}
for name, found, expected in zip(("value", "gradient"), *results, strict=True):
    if not (found - expected).abs().max() <= 1e-10 * expected.abs().max():
        wrong[name] = f"differs by {(found - expected).abs().max()}"
print(json.dumps(wrong))
"""


@pytest.mark.slow
def test_exported_it_keeps_value_and_published_gradient():
    assert_nothing_wrong(EXPORTED)
