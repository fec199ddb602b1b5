"""SimA attention: every order of computation equals the definition, in output and gradients."""

import pytest
import torch
from torch.autograd import gradcheck

from sansmax.ops import L1State, ProjectedL1State, projected_l1, sima_affine, sima_attend, sima_attention

B, HEADS, D, C_IN, C_OUT = 3, 2, 7, 11, 17
DIRECT = ("quadratic", "linear")
ORDERS = (*DIRECT, "moments")

every_order = pytest.mark.parametrize("order", ORDERS)
direct_order = pytest.mark.parametrize("order", DIRECT)


def definition(q, k, v, weight=None, eps=1e-12, reference_tokens=None):
    """The slow way: an explicit n x n matrix, each token counted by its weight."""
    w = q.new_ones(q.shape[0], q.shape[2]) if weight is None else weight.to(q.dtype)
    w = w[:, None, :, None]
    q, k = (x / (w * x.abs()).sum(-2, keepdim=True).clamp_min(eps) for x in (q, k))
    out = (q @ k.mT) @ (w * v)
    return out if reference_tokens is None else out * w.sum(-2, keepdim=True) / reference_tokens


def project(x, p):
    return ((x @ p[f"w_{n}"].mT + p[f"b_{n}"]).unflatten(-1, (HEADS, D)).transpose(1, 2) for n in "qkv")


def layer(order, x, p, weight=None, **options):
    """The multi-head layer with its projections, by the definition or in one of the orders."""
    if order == "moments":
        w, bias = (torch.cat([p[f"{kind}_{n}"] for n in "qkv"]) for kind in "wb")
        both = 2 * HEADS * D
        state = ProjectedL1State.of(x, w[:both], bias[:both], weight)
        m, c = sima_affine(state, w, bias, p["w_out"], p["b_out"], HEADS, **options)
        real = x if weight is None or weight.dtype != torch.bool else x.masked_fill(~weight[..., None], 0.0)
        return real @ m.to(x.dtype) + c.to(x.dtype).unsqueeze(1)
    q, k, v = project(x, p)
    attend = definition if order == "definition" else sima_attention
    options |= {} if order == "definition" else {"order": order}
    masks = {"weight": weight} if order == "definition" else {"mask": weight}
    return attend(q, k, v, **masks, **options).transpose(1, 2).flatten(2) @ p["w_out"].mT + p["b_out"]


def draw_parameters(dtype=torch.float64):
    shapes = {f"w_{n}": (HEADS * D, C_IN) for n in "qkv"} | {f"b_{n}": (HEADS * D,) for n in "qkv"}
    shapes |= {"w_out": (C_OUT, HEADS * D), "b_out": (C_OUT,)}
    return {n: torch.randn(shape, dtype=dtype, requires_grad=True) for n, shape in shapes.items()}


def draw_heads(n, b=B, dtype=torch.float64):
    return [torch.randn(b, HEADS, n, D, dtype=dtype) for _ in "qkv"]


def draw_weight(kind, n, b=B):
    if kind == "mask":
        # never without a real token: that has a test of its own
        return (torch.rand(b, n) < 0.6).index_fill(1, torch.tensor(0), True)
    return torch.rand(b, n, dtype=torch.float64, requires_grad=True) if kind == "weight" else None


def gradients(out, by, inputs):
    return torch.autograd.grad(out, inputs, by, allow_unused=True, materialize_grads=True)


@pytest.fixture(params=["kernel", "plain"], autouse=True)
def both_ways_of_summing(request, monkeypatch):
    monkeypatch.setattr("sansmax.ops.sima.FEW", 0 if request.param == "kernel" else 2**40)


@every_order
@pytest.mark.parametrize("reference_tokens", [None, 5])
@pytest.mark.parametrize("kind", [None, "mask", "weight"])
@pytest.mark.parametrize("n", [5, 13])
def test_each_order_equals_the_definition_in_output_and_gradients(order, reference_tokens, kind, n, assert_same):
    p, x = draw_parameters(), torch.randn(B, n, C_IN, dtype=torch.float64, requires_grad=True)
    weight = draw_weight(kind, n)
    real = weight if kind == "mask" else torch.ones(B, n, dtype=torch.bool)
    options = {"reference_tokens": reference_tokens}
    found, expected = (layer(o, x, p, weight, **options)[real] for o in (order, "definition"))
    assert_same(found, expected, "output")
    inputs = {"x": x, **p} | ({"weight": weight} if kind == "weight" else {})
    by = torch.randn_like(found)
    pairs = (gradients(out, by, list(inputs.values())) for out in (found, expected))
    for name, a, b in zip(inputs, *pairs, strict=True):
        assert_same(a, b, f"gradient of {name}")


@pytest.mark.parametrize("n", [29, 251])
def test_orders_agree_in_float32(n, assert_same):
    p, x = draw_parameters(torch.float32), torch.randn(B, n, C_IN, requires_grad=True)
    by, results = torch.randn(B, n, C_OUT), []
    for order in ORDERS:
        out = layer(order, x, p)
        results.append([out, *gradients(out, by, [x, *p.values()])])
    for other in results[1:]:
        for name, a, b in zip(["output", "x", *p], other, results[0], strict=True):
            assert_same(a, b, name)


@every_order
@pytest.mark.parametrize("kind", [None, "mask", "weight"])
def test_gradients_equal_finite_differences(order, kind):
    p, x = draw_parameters(), torch.randn(1, 5, C_IN, dtype=torch.float64, requires_grad=True)
    weight = draw_weight(kind, 5, b=1)
    directions = {name: torch.randn_like(t) for name, t in p.items()}
    t = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def out(t, x, *w):
        moved = {name: p[name].detach() + t * directions[name] for name in p}
        return layer(order, x, moved, w[0] if w else weight).sum(-1)

    assert gradcheck(out, (t, x, weight) if kind == "weight" else (t, x))


@pytest.mark.parametrize("n", [1, 1024, 1025, 2500])
@pytest.mark.parametrize("masked", [False, True])
def test_the_projected_norm_does_not_depend_on_its_blocks(n, masked, assert_same):
    x = torch.randn(2, n, C_IN, dtype=torch.float64, requires_grad=True)
    w, b = torch.randn(5, C_IN, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    b.requires_grad_()
    mask = draw_weight("mask", n, b=2) if masked else None
    found = projected_l1(x, w, b, mask)
    expected = (x @ w.mT + b).abs()
    expected = (expected if mask is None else expected * mask[..., None]).sum(1)
    assert_same(found, expected, "norm")
    by = torch.randn_like(found)
    for name, a, e in zip("xwb", *(gradients(out, by, [x, w, b]) for out in (found, expected)), strict=True):
        assert_same(a, e, name)


@direct_order
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_as_accurate_as_plain_torch_in_float32(order, dtype, masked, assert_as_accurate):
    n = 1009
    # of the size of activations times n: the output is of size 1, so that float16 does not round it all to 0
    q, k, v = draw_heads(n, dtype=torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), (v * n).to(dtype)
    mask = draw_weight("mask", n) if masked else None
    real = torch.ones(B, n, dtype=torch.bool) if mask is None else mask
    found = sima_attention(q, k, v, mask=mask, order=order)
    plain = definition(q.float(), k.float(), v.float(), mask).to(dtype)
    exact = definition(q.double(), k.double(), v.double(), mask)
    assert_as_accurate(*(t.transpose(1, 2)[real] for t in (found, plain, exact)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_affine_layer_is_as_accurate_as_the_plain_one(dtype, assert_as_accurate):
    x = torch.randn(B, 1009, C_IN).to(dtype)
    p = {name: t.detach().to(dtype) for name, t in draw_parameters(torch.float32).items()}
    exact = layer("definition", x.double(), {n: t.double() for n, t in p.items()}, reference_tokens=7)
    found, plain = (layer(order, x, p, reference_tokens=7) for order in ("moments", "definition"))
    assert_as_accurate(found, plain, exact)


@pytest.mark.parametrize("masked", [False, True])
def test_autocast_does_not_lower_the_precision(masked):
    q, k, v = draw_heads(101, dtype=torch.float32)
    mask = draw_weight("mask", 101) if masked else None
    x, p = torch.randn(B, 101, C_IN), draw_parameters(torch.float32)

    def everything():
        yield from L1State.of(q, k, v, None if mask is None else mask.unsqueeze(1).expand(B, HEADS, 101))
        yield from (sima_attention(q, k, v, mask=mask, order=order) for order in DIRECT)
        w, bias = (torch.cat([p[f"{kind}_{n}"] for n in "qkv"]) for kind in "wb")
        both = 2 * HEADS * D
        state = ProjectedL1State.of(x, w[:both], bias[:both], mask)
        yield state.qk_norm
        yield from gradients(state.qk_norm.sum(), None, [p["w_q"], p["b_k"]])
        yield from sima_affine(state, w, bias, p["w_out"], p["b_out"], HEADS)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = list(everything())
    for a, b in zip(inside, everything(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_a_million_tokens_in_bfloat16_neither_overflow_nor_underflow():
    n = 2**20
    q, k, v = (torch.randn(1, 1, n, 4, dtype=torch.bfloat16) for _ in "qkv")
    # values that agree with the keys, so that the sum over the tokens is large, and of one sign
    v = k
    out = sima_attention(q, k, v, order="linear").double()
    exact = q.double() @ (
        (k.double().mT @ v.double()) / (q.double().abs().sum(-2) * k.double().abs().sum(-2)).unsqueeze(-1)
    )
    assert (out != 0).all()
    assert (out - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("sizes", [(13,), (6, 7), (0, 13), (3, 0, 1, 2, 7)])
@pytest.mark.parametrize("weighted", [False, True])
def test_split_tokens_give_the_same_state_output_and_gradients(sizes, weighted, assert_same):
    heads = [x.requires_grad_() for x in draw_heads(13)]
    weight = torch.rand(B, HEADS, 13, dtype=torch.float64, requires_grad=True) if weighted else None
    by = torch.randn(B, HEADS, 13, D, dtype=torch.float64)

    def run(sizes):
        pieces = list(zip(*(x.split(sizes, dim=2) for x in heads), strict=True))
        weights = [None] * len(pieces) if weight is None else weight.split(sizes, dim=2)
        total, *rest = (L1State.of(*piece, w) for piece, w in zip(pieces, weights, strict=True))
        for state in rest:
            total = total.merge(state)
        out = torch.cat([sima_attend(total, piece[0], reference_tokens=3) for piece in pieces], dim=2)
        inputs = [*heads, weight] if weight is not None else heads
        return [*total, out, *gradients(out, by, inputs)]

    for i, (found, expected) in enumerate(zip(run(sizes), run((13,)), strict=True)):
        assert_same(found, expected, f"result {i}")


@pytest.mark.parametrize("sizes", [(6, 7), (0, 13), (3, 0, 1, 2, 7)])
def test_split_tokens_give_the_same_layer(sizes, assert_same):
    p, x = draw_parameters(), torch.randn(B, 13, C_IN, dtype=torch.float64)
    w, b = (torch.cat([p[f"{kind}_q"], p[f"{kind}_k"]]) for kind in "wb")
    total, *rest = (ProjectedL1State.of(piece, w, b) for piece in x.split(sizes, dim=1))
    for state in rest:
        total = state.merge(total)
    whole = ProjectedL1State.of(x, w, b)
    for name, found, expected in zip(ProjectedL1State._fields, total, whole, strict=True):
        assert_same(found, expected, name)


@every_order
def test_permuted_tokens_give_the_permuted_output(order, assert_same):
    p, x, permutation = draw_parameters(), torch.randn(B, 13, C_IN, dtype=torch.float64), torch.randperm(13)
    assert_same(layer(order, x[:, permutation], p), layer(order, x, p)[:, permutation])


@every_order
def test_whole_weights_repeat_tokens(order, assert_same):
    p, x = draw_parameters(), torch.randn(1, 13, C_IN, dtype=torch.float64)
    times = torch.arange(13) % 4
    repeated = layer(order, x.repeat_interleave(times, dim=1), p, reference_tokens=3)
    found = layer(order, x, p, times.double()[None], reference_tokens=3).repeat_interleave(times, dim=1)
    assert_same(found, repeated)


@every_order
def test_images_do_not_see_each_other(order, assert_same):
    p, x = draw_parameters(), torch.randn(B, 13, C_IN, dtype=torch.float64)
    together = layer(order, x, p)
    for i in range(B):
        assert_same(together[i : i + 1], layer(order, x[i : i + 1], p))


@direct_order
def test_the_output_is_linear_in_the_values(order, assert_same):
    q, k, v = draw_heads(13)
    other = torch.randn_like(v)
    both = sima_attention(q, k, 2 * v - 3 * other, order=order)
    assert_same(both, 2 * sima_attention(q, k, v, order=order) - 3 * sima_attention(q, k, other, order=order))


@direct_order
def test_the_scale_of_queries_and_keys_cancels(order, assert_same):
    q, k, v = draw_heads(13)
    scale_q, scale_k = (torch.rand(B, HEADS, 1, D, dtype=torch.float64) + 0.5 for _ in "qk")
    assert_same(sima_attention(q * scale_q, k * scale_k, v, order=order), sima_attention(q, k, v, order=order))


@every_order
def test_nan_in_a_real_token_shows_in_its_own_image_only(order):
    p, x = draw_parameters(), torch.randn(B, 13, C_IN, dtype=torch.float64)
    mask = draw_weight("mask", 13)
    x[1, 0, 3] = float("nan")
    out = layer(order, x, p, mask)
    assert out[1][mask[1]].isnan().all()
    assert out[[0, 2]].isfinite().all()


@every_order
@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_may_hold_anything(order, garbage, assert_same):
    real, p = draw_weight("mask", 13, b=1), draw_parameters()
    x = torch.randn(1, 13, C_IN, dtype=torch.float64)
    padded = x.masked_fill(~real[..., None], garbage).requires_grad_()
    alone = x[:, real[0]].clone().requires_grad_()
    if order == "moments":
        inside, bag = layer(order, padded, p, real)[:, real[0]], layer(order, alone, p)
    else:
        # the projections are plain torch, which passes NaN on to the gradients of the weights
        inside, bag = (sima_attention(*project(t, p), mask=m, order=order) for t, m in ((padded, real), (alone, None)))
        assert (inside.transpose(1, 2)[~real] == 0).all()
        inside = inside[:, :, real[0]]
    assert_same(inside, bag, "output")
    by = torch.randn_like(bag)
    a, e = (gradients(out, by, [of])[0] for out, of in ((inside, padded), (bag, alone)))
    assert_same(a[:, real[0]], e, "gradient")
    assert order != "moments" or (a[:, ~real[0]] == 0).all()


@direct_order
@pytest.mark.parametrize("garbage", [7.0, float("nan")])
def test_an_image_without_real_tokens_is_zero_and_spares_the_others(order, garbage, assert_same):
    mask, heads = draw_weight("mask", 13), draw_heads(13)
    mask[1] = False
    for x in heads:
        x[1] = garbage
    heads = [x.requires_grad_() for x in heads]
    out = sima_attention(*heads, mask=mask, order=order)
    assert (out[1] == 0).all()
    assert_same(out[[0, 2]], sima_attention(*(x[[0, 2]] for x in heads), mask=mask[[0, 2]], order=order))
    for g in gradients(out.sum(), None, heads):
        assert g.isfinite().all()
        assert (g[1] == 0).all()


@direct_order
def test_a_channel_of_zeros_adds_nothing(order, assert_same):
    q, k, v = draw_heads(13)
    q[..., 2], k[..., 4] = 0, 0
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = sima_attention(*inputs, order=order)
    rest = [i for i in range(D) if i not in (2, 4)]
    assert_same(out, definition(q[..., rest], k[..., rest], v))
    assert all(g.isfinite().all() for g in gradients(out.sum(), None, inputs))


def test_one_token_gives_its_value_by_the_signs(assert_same):
    q, k, v = draw_heads(1)
    expected = (q.sign() * k.sign()).sum(-1, keepdim=True) * v
    for order in DIRECT:
        assert_same(sima_attention(q, k, v, order=order), expected)


def test_a_reference_of_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="reference_tokens must be at least 1"):
        sima_attention(*draw_heads(3), reference_tokens=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_kernels_are_lawful_operations_of_torch():
    x, mask = torch.randn(2, 5, C_IN, dtype=torch.float64, requires_grad=True), draw_weight("mask", 5, b=2)
    w, b = torch.randn(4, C_IN, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    for arguments in ((x, w, b.requires_grad_(), mask), (x, w, None, None)):
        torch.library.opcheck(torch.ops.sansmax.projected_l1_norm.default, arguments)
    heads = [h.requires_grad_() for h in draw_heads(5, b=2)]
    for of_heads in (None, mask.unsqueeze(1).expand(2, HEADS, 5)):
        torch.library.opcheck(torch.ops.sansmax.l1_sums.default, (*heads, of_heads))


@pytest.mark.parametrize("n", [1, 1024, 1025, 2500])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_over_strided_heads_do_not_depend_on_their_blocks(n, masked, assert_same, monkeypatch):
    monkeypatch.setattr("sansmax.ops.sima.FEW", 0)
    qkv = torch.randn(2, n, 3, HEADS, D, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = draw_weight("mask", n, b=2) if masked else None
    weight = None if mask is None else mask.unsqueeze(1).expand(2, HEADS, n)
    w = torch.ones(2, 1, n, 1, dtype=torch.float64) if mask is None else mask[:, None, :, None].double()
    expected = ((w * q.abs()).sum(-2), (w * k.abs()).sum(-2), k.mT @ (w * v))
    _, *found = L1State.of(q, k, v, weight)
    by = [torch.randn_like(t) for t in found]
    for a, e in zip(found, expected, strict=True):
        assert_same(a, e, "sum")
    assert_same(*(torch.autograd.grad(out, qkv, by)[0] for out in (found, expected)), "gradient")
