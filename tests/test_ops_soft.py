"""SOFT attention: every order and way of computing equals the definition, in output and gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from apart import assert_nothing_wrong
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from sansmax.ops import soft_pieces
from sansmax.ops.landmarks import sequence_landmarks
from sansmax.ops.soft import (
    SoftLayerState,
    SoftState,
    check_landmarks,
    landmark_inverse,
    soft_affine,
    soft_attend,
    soft_attention,
    soft_kernel,
    soft_layer_rows,
)
from sansmax.ops.soft_pieces import soft_apply, soft_mix, soft_rows, soft_summarise

GOLDEN = Path(__file__).parent / "golden" / "gaussian_distance.npz"
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


@every_way
@every_variant
@every_kind
def test_each_way_equals_the_definition_in_output_and_gradients(way, variant, kind, assert_same):
    # more landmarks than channels, where P does not fit into the place of the result, and fewer
    for m in (5, 11):
        inputs, weight = draw(m=m), draw_weight(kind)
        found = attend(way, *inputs, weight, **VARIANTS[variant])
        expected = definition(*inputs, weight, **VARIANTS[variant])
        compare(assert_same, found, expected, [*inputs, weight] if kind == "weight" else inputs)


@pytest.fixture(params=[(1, 1), (60, 4), (300, 1)], ids=str)
def piece(request, monkeypatch):
    """One token of one image at a time, some tokens of one, and some images whole."""
    monkeypatch.setattr(soft_pieces, "CPU_PIECE", request.param[0])
    monkeypatch.setattr(soft_pieces, "LEAST_TOKENS", request.param[1])


@pytest.mark.parametrize("way", ["blocks", "state"])
@pytest.mark.parametrize("m", [5, 11])
@some_kind
def test_the_size_of_pieces_and_the_layout_change_nothing(piece, way, m, kind, assert_same):
    inputs, weight = draw(m=m), draw_weight(kind)
    with_weight = [*inputs, weight] if kind == "weight" else inputs
    # as drawn, and with the heads of a token side by side, as a projection gives them
    aside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:2]]
    for q, v in (inputs[:2], aside):
        expected = attend("torch", *inputs, weight)
        compare(assert_same, attend(way, q, v, inputs[2], weight), expected, with_weight)


@some_kind
def test_the_layer_without_values_equals_the_layer_with_them(piece, kind, assert_same):
    n, c, e = 13, 11, HEADS * D
    x = torch.randn(B, n, c, dtype=torch.float64, requires_grad=True)
    shapes = [(e, c), (e,), (e, c), (e,), (17, e)]
    w_q, b_q, w_v, b_v, w_out = p = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    landmarks, weight = draw()[2], draw_weight(kind)

    def heads(w, b):
        return (x @ w.mT + b).unflatten(-1, (HEADS, D)).transpose(1, 2)

    rows = soft_layer_rows(heads(w_q, b_q), landmarks, weight)
    pieces = zip(*(t.split((3, 0, 10), 1) for t in (rows, x, weight)), strict=True)
    first, *rest = (SoftLayerState.of(*piece) for piece in pieces)
    for state in rest:
        first = first.merge(state)
    found = rows @ soft_affine(first, landmark_inverse(landmarks), w_v, b_v, w_out)
    out = attend("torch", heads(w_q, b_q), heads(w_v, b_v), landmarks, weight)
    expected = out.transpose(1, 2).flatten(2) @ w_out.mT
    compare(assert_same, found, expected, [x, *p, landmarks, *([weight] if kind == "weight" else [])])


def test_squared_distances_are_those_of_the_published_code():
    golden = {name: torch.from_numpy(x) for name, x in np.load(GOLDEN).items()}
    found = -soft_kernel(golden["q"], golden["k"]).log() * 2 * golden["q"].shape[-1] ** 0.5
    assert (found - golden["dist"]).abs().max() <= 1e-9 * golden["dist"].max()


@every_way
@some_kind
def test_gradients_equal_finite_differences(way, kind):
    inputs, weight = draw(3, 2, b=1), draw_weight(kind, 3)
    weight = weight if weight is None else weight[:1].detach().requires_grad_(kind == "weight")

    def out(*inputs):
        return attend(way, *inputs[:3], inputs[3] if kind == "weight" else weight, inverse="cholesky")

    with_weight = (*inputs, weight) if kind == "weight" else inputs
    assert gradcheck(out, with_weight)
    if way == "torch" and kind == "weight":
        assert gradgradcheck(out, with_weight)


def test_a_second_derivative_of_pieces_is_an_error():
    q, v, landmarks = draw()
    (grad,) = torch.autograd.grad(soft_attention(q, v, landmarks).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), q)


# opcheck looks at the gradient of its own copies
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@every_kind
def test_the_operators_keep_their_contracts(kind):
    q, v, landmarks = draw()
    weight, z = draw_weight(kind), landmark_inverse(landmarks.detach()).requires_grad_()
    right = torch.randn_like(landmarks).requires_grad_()
    opcheck(soft_summarise, (q, v, landmarks, weight))
    opcheck(soft_apply, (q, landmarks, right, weight))
    opcheck(soft_mix, (q, v, landmarks, z, weight))
    opcheck(soft_rows, (q, landmarks, weight))


@some_kind
def test_both_results_of_a_mix_have_gradients_for_any_matrix(kind, assert_same):
    (q, v, landmarks), weight = draw(), draw_weight(kind)
    z = torch.randn(B, HEADS, M, M, dtype=torch.float64, requires_grad=True)
    p, w = kernel(q, landmarks), weight.double()[:, None, :, None]
    p = p * w if kind == "mask" else p
    total = p.mT @ (w * v)
    inputs = [q, v, landmarks, z] + ([weight] if kind == "weight" else [])
    both = (torch.cat(pair, dim=2) for pair in (soft_mix(q, v, landmarks, z, weight), (p @ z @ total, total)))
    compare(assert_same, *both, inputs)


def test_backward_keeps_the_inputs_and_small_matrices_only():
    inputs, kept = draw(1009), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        soft_attention(*inputs)
    storages = {x.untyped_storage().data_ptr() for x in inputs}
    others = [x for x in kept if x.untyped_storage().data_ptr() not in storages]
    assert others
    assert max(x.numel() for x in others) <= B * HEADS * M * max(M, D)


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", ["soft", "soft++", "exact"])
def test_is_as_accurate_as_plain_torch_in_float32(way, dtype, variant, assert_as_accurate):
    inputs = [x.detach().to(dtype) for x in draw(1009)]
    plain, exact = (definition(*(x.to(w) for x in inputs), **VARIANTS[variant]) for w in (torch.float32, torch.float64))
    assert_as_accurate(attend(way, *inputs, **VARIANTS[variant]), plain.to(dtype), exact)


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bit_are_as_accurate_as_in_float32(way, dtype, assert_as_accurate):
    inputs, by = [x.detach().to(dtype) for x in draw(101)], torch.randn(B, HEADS, 101, D).to(dtype)
    results = []
    for wide in (dtype, torch.float32, torch.float64):
        some = [x.to(wide).requires_grad_() for x in inputs]
        out = attend(way, *some) if wide == dtype else definition(*some)
        results.append(gradients(out, by.to(wide), some))
    for found, plain, exact in zip(*results, strict=True):
        assert_as_accurate(found, plain.to(dtype), exact)


@every_way
@every_variant
def test_autocast_does_not_lower_the_precision(way, variant):
    inputs, results = draw(101, dtype=torch.float32), []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = attend(way, *inputs, **VARIANTS[variant])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled and way == "blocks"):
            # backward runs under autocast too, where a network is checkpointed; that of the operators is their own
            results.append([out, *torch.autograd.grad(out.sum(), inputs[1])])
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS[:3])
def test_far_from_zero_no_digits_are_lost(way):
    # all points on a grid of eighths, that float32 still has there
    q, landmarks = ((torch.randn(B, HEADS, n, D) * 8).round() / 8 for n in (101, M))
    v = torch.randn(B, HEADS, 101, D)
    exact = definition(q.double(), v.double(), landmarks.double(), inverse="cholesky")
    near, far = (
        (attend(way, q + shift, v, landmarks + shift, inverse="cholesky").double() - exact).abs().max()
        for shift in (0.0, 2.0**16)
    )
    # the mean of the landmarks is rounded there, by less than an eighth
    assert far <= 4 * near + torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("sizes", [(13,), (6, 7), (0, 13), (13, 0), (3, 0, 1, 2, 7)])
@pytest.mark.parametrize("way", ["state", "plain state"])
@some_kind
def test_split_tokens_give_the_same_output_and_gradients(sizes, way, kind, assert_same):
    inputs, weight = draw(), draw_weight(kind)
    q, v, landmarks = inputs
    impl = "torch" if way == "plain state" else "blocks"
    pieces = list(zip(q.split(sizes, 2), v.split(sizes, 2), weight.split(sizes, 1), strict=True))
    total, *rest = (SoftState.of(a, b, landmarks, w, impl=impl) for a, b, w in reversed(pieces))
    for state in rest:
        total = total.merge(state)
    out = [soft_attend(total, a, landmarks, mask=w, impl=impl) for a, _, w in pieces]
    expected = attend("torch", *inputs, weight)
    compare(assert_same, torch.cat(out, 2), expected, [*inputs, weight] if kind == "weight" else inputs)


@every_way
def test_permuted_tokens_give_the_permuted_output(way, assert_same):
    (q, v, landmarks), permutation = draw(), torch.randperm(13)
    found = attend(way, q[:, :, permutation], v[:, :, permutation], landmarks)
    assert_same(found, attend(way, q, v, landmarks)[:, :, permutation])


@every_way
def test_whole_weights_repeat_tokens(way, assert_same):
    (q, v, landmarks), times = draw(b=1), torch.arange(13) % 4
    repeated = attend(way, q.repeat_interleave(times, 2), v.repeat_interleave(times, 2), landmarks)
    found = attend(way, q, v, landmarks, times.double()[None])
    assert_same(found.repeat_interleave(times, 2), repeated)


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
def test_the_output_is_linear_in_the_values(way, assert_same):
    (q, v, landmarks), other = draw(), draw()[1]
    found = attend(way, q, 2 * v - 3 * other, landmarks)
    assert_same(found, 2 * attend(way, q, v, landmarks) - 3 * attend(way, q, other, landmarks))


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


COMPILED = """
import json, traceback
import torch
from sansmax.ops.landmarks import grid_landmarks, sequence_landmarks
from sansmax.ops.soft import SoftState, soft_attend, soft_attention

torch.manual_seed(0)
cases = {
    "sequence": {},
    "state": {"inverse": "halved", "normalized": True},
    "grid": {"inverse": "cholesky", "impl": "torch"},
}
wrong = {}

class Layer(torch.nn.Module):
    def __init__(self, kind, options):
        super().__init__()
        self.kind, self.options = kind, options

    def forward(self, q, v, mask):
        x = q.transpose(1, 2).flatten(2)
        if self.kind == "grid":
            pooled, real = grid_landmarks(x, (x.shape[1] // 2, 2), (2, 2), mask)
        else:
            pooled, real = sequence_landmarks(x, 5, mask)
        landmarks = pooled.unflatten(-1, (q.shape[1], q.shape[3])).transpose(1, 2)
        if self.kind == "state":
            state = SoftState.of(q, v, landmarks, mask)
            return soft_attend(state, q, landmarks, mask=mask, landmark_mask=real, **self.options)
        return soft_attention(q, v, landmarks, mask=mask, landmark_mask=real, **self.options)

def draw(b, n):
    heads = [torch.randn(b, 2, n, 7, requires_grad=True) for _ in range(2)]
    return *heads, (torch.rand(b, n) < 0.7).index_fill(1, torch.tensor(0), True)

def compare(name, found, expected):
    for a, b in zip(found, expected, strict=True):
        if not (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max()):
            wrong[name] = f"differs by {(a - b).abs().max()}"

for name, options in cases.items():
    # tracing takes time by the step
    layer = Layer(name, {"steps": 3, **options})
    try:
        *heads, mask = draw(3, 12)
        results = []
        for f in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
            out = f(*heads, mask)
            results.append([out, *torch.autograd.grad(out.square().sum(), heads)])
        compare(f"compile {name}", *results)
    except Exception:
        wrong[f"compile {name}"] = traceback.format_exc()
    try:
        b, n = torch.export.Dim("b"), 2 * torch.export.Dim("n", min=2)
        shapes = {"q": {0: b, 2: n}, "v": {0: b, 2: n}, "mask": {0: b, 1: n}}
        inputs = tuple(x.detach() for x in draw(3, 12))
        program = torch.export.export(layer, inputs, dynamic_shapes=shapes).module()
        for size in ((2, 26), (1, 4)):
            inputs = draw(*size)
            compare(f"export {name}", [program(*inputs)], [layer(*inputs)])
    except Exception:
        wrong[f"export {name}"] = traceback.format_exc()
print(json.dumps(wrong))
"""


def test_attention_compiles_whole_and_exports_for_any_batch_and_number_of_tokens():
    assert_nothing_wrong(COMPILED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "cubic"}, r"order of soft attention must be one of auto, linear, quadratic, got 'cubic'"),
        ({"inverse": "lu"}, r"inverse of soft attention must be one of newton, halved, cholesky, got 'lu'"),
        ({"impl": "fast"}, r"impl of soft attention must be one of auto, blocks, torch, got 'fast'"),
        ({"impl": "blocks", "order": "quadratic"}, r'use impl="torch" with "quadratic"'),
        ({"landmarks": torch.zeros(B, HEADS, 0, D)}, r"landmarks are none, shape \(3, 2, 0, 7\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_wrong_argument_is_an_error_that_says_what_to_do(change, message):
    q, v, landmarks = draw()
    with pytest.raises(ValueError, match=message):
        soft_attention(**{"q": q, "v": v, "landmarks": landmarks, **change})


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((B, HEADS, M, 3), None, r"landmarks must be .* = \(3, 2, m, 7\) to fit q, got \(3, 2, 5, 3\)"),
        ((B, HEADS, M), None, r"landmarks must be .* to fit q, got \(3, 2, 5\)"),
        (
            (B, HEADS, M, D),
            torch.ones(B, 4).bool(),
            r"boolean with .* landmark, \(3, 5\), got torch.bool of .*\(3, 4\)",
        ),
        ((B, HEADS, M, D), torch.ones(B, M), r"landmark_mask must be boolean .*, got torch.float32 of shape \(3, 5\)"),
    ],
    ids=["channels", "axes", "mask of another shape", "mask of another type"],
)
def test_landmarks_that_do_not_fit_are_an_error(shape, mask, message):
    with pytest.raises(ValueError, match=message):
        check_landmarks(draw()[0], torch.zeros(shape), mask)
    with pytest.raises(ValueError, match=r"landmarks must be of a floating type, got torch.int32; convert"):
        check_landmarks(draw()[0], draw()[2].int(), None)
