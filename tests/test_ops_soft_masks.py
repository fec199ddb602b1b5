"""SOFT attention with padding, empty images, and landmarks that are missing, few, far apart or coincide."""

import pytest
import torch
from soft_definition import (
    HEADS,
    VARIANTS,
    WAYS,
    B,
    D,
    M,
    attend,
    compare,
    definition,
    draw,
    draw_weight,
    every_variant,
    every_way,
    gradients,
    kernel,
)

from sansmax.ops.landmarks import sequence_landmarks
from sansmax.ops.soft import soft_attention


@every_way
@every_variant
def test_images_do_not_see_each_other(way, variant, assert_same):
    q, v, landmarks = draw()
    # kernels of landmarks apart, near, and nearly the same
    landmarks = landmarks * torch.tensor([3.0, 1.0, 0.1])[:, None, None, None]
    together = attend(way, q, v, landmarks, **VARIANTS[variant])
    for i in range(B):
        some = slice(i, i + 1)
        assert_same(together[some], attend(way, q[some], v[some], landmarks[some], **VARIANTS[variant]))


@every_way
def test_nan_in_a_real_token_shows_in_its_own_image_only(way):
    mask = draw_weight("mask")
    for spoilt in range(3):
        inputs = [x.detach() for x in draw()]
        inputs[spoilt][1, 0, 0, 3] = float("nan")
        out = attend(way, *inputs, mask)
        assert out[1, 0][mask[1]].isnan().any(-1).all()
        assert out[[0, 2]].isfinite().all()


@every_way
@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_may_hold_anything(way, garbage, assert_same):
    real = draw_weight("mask")[:1]
    q, v, landmarks = draw(b=1)
    padded = [x.detach().masked_fill(~real[:, None, :, None], garbage).requires_grad_() for x in (q, v)]
    alone = [x.detach()[:, :, real[0]].requires_grad_() for x in (q, v)]
    out = attend(way, *padded, landmarks, real)
    bag = attend(way, *alone, landmarks)
    assert (out[:, :, ~real[0]] == 0).all()
    assert_same(out[:, :, real[0]], bag)
    by = torch.randn_like(out)
    of_padded = gradients(out, by, [*padded, landmarks])
    of_bag = gradients(bag, by[:, :, real[0]], [*alone, landmarks])
    for a, b in zip(of_padded[:2], of_bag[:2], strict=True):
        assert_same(a[:, :, real[0]], b, "gradient")
        assert (a[:, :, ~real[0]] == 0).all()
    assert_same(of_padded[2], of_bag[2], "gradient of landmarks")


@pytest.mark.parametrize("way", WAYS[:3])
@every_variant
def test_an_image_without_real_tokens_is_zero_and_spares_the_others(way, variant, assert_same):
    mask, inputs = draw_weight("mask"), [x.detach() for x in draw()]
    mask[1] = False
    for x in inputs:
        x[1] = float("nan")
    inputs = [x.requires_grad_() for x in inputs]
    out = attend(way, *inputs, mask, **VARIANTS[variant])
    assert (out[1] == 0).all()
    others = [x.detach()[[0, 2]].requires_grad_() for x in inputs]
    expected = attend(way, *others, mask[[0, 2]], **VARIANTS[variant])
    assert_same(out[[0, 2]], expected)
    for a, b in zip(*(gradients(y.sum(), None, x) for y, x in ((out, inputs), (expected, others))), strict=True):
        assert_same(a[[0, 2]], b, "gradient")
        assert (a[1] == 0).all()
    # a weight of zero everywhere
    zero = torch.zeros(1, 13, dtype=torch.float64)
    assert (attend(way, *draw(b=1), zero, **VARIANTS[variant]) == 0).all()


@every_way
@every_variant
def test_landmarks_that_are_none_have_no_part_in_anything(way, variant, assert_same):
    inputs = draw()
    real = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
    found = attend(way, *inputs, landmark_mask=real, **VARIANTS[variant])
    compare(assert_same, found, definition(*inputs, landmark_mask=real, **VARIANTS[variant]), inputs, scale=1.0)
    # none at all
    real[0] = False
    out = attend(way, *inputs, landmark_mask=real, **VARIANTS[variant])
    assert (out[0] == 0).all()
    assert_same(out[1:], found[1:])


def test_fewer_tokens_than_landmarks_attend_through_themselves(assert_same):
    q, v, _ = draw(3)
    pooled, real = sequence_landmarks(q.transpose(1, 2).flatten(2), M)
    landmarks = pooled.unflatten(-1, (HEADS, D)).transpose(1, 2)
    found = soft_attention(q, v, landmarks, landmark_mask=real, inverse="cholesky", ridge=0.0)
    # P = A, so that the exact inverse leaves the kernel itself
    expected = kernel(q, q) @ v
    assert_same(found, expected, scale=1.0)


@every_way
@pytest.mark.parametrize("n", [1, 13])
def test_one_landmark_is_a_weighted_sum(way, n, assert_same):
    inputs = draw(n, 1)
    p = kernel(inputs[0], inputs[2])
    compare(assert_same, attend(way, *inputs), p @ (p.mT @ inputs[1]) / 1.01, inputs)


@every_way
def test_landmarks_far_apart_give_zero_as_published_and_the_sum_when_exact(way, assert_same):
    q, v, landmarks = (x.detach() for x in draw(m=2))
    landmarks[:, :, 1] += 100.0
    p = kernel(q, landmarks)
    assert (attend(way, q, v, landmarks, **VARIANTS["soft++"]) == 0).all()
    for variant in ("soft", "exact", "exact++"):
        assert_same(attend(way, q, v, landmarks, **VARIANTS[variant]), p @ (p.mT @ v) / 1.01)


@pytest.mark.parametrize("variant", ["exact", "exact++"])
def test_landmarks_that_nearly_coincide_are_finite_when_exact_in_float32(variant):
    q, v, landmarks = (x.detach().float() for x in draw(101))
    landmarks = landmarks[:, :, :1] + 1e-4 * landmarks
    for ridge in (1e-2, 1e-10):
        assert soft_attention(q, v, landmarks, ridge=ridge, **VARIANTS[variant]).isfinite().all()
