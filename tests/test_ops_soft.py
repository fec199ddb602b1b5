"""SOFT attention: every order and way of computing equals the definition, in output and gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from apart import assert_nothing_wrong
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
    every_kind,
    every_variant,
    every_way,
    gradients,
    some_kind,
)
from torch.autograd import gradcheck, gradgradcheck

from sansmax.ops.soft import SoftState, check_landmarks, soft_attend, soft_attention, soft_kernel

GOLDEN = Path(__file__).parent / "golden" / "gaussian_distance.npz"


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
def test_the_output_is_linear_in_the_values(way, assert_same):
    (q, v, landmarks), other = draw(), draw()[1]
    found = attend(way, q, 2 * v - 3 * other, landmarks)
    assert_same(found, 2 * attend(way, q, v, landmarks) - 3 * attend(way, q, other, landmarks))


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


@pytest.mark.slow
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
