"""Point-wise attention: whole, in blocks and through features equals the definition, in output and gradients."""

import pytest
import torch
from apart import answer_of
from torch.autograd import gradcheck

from sansmax.ops import pointwise, powers
from sansmax.ops.pointwise import pointwise_attention

B, HEADS, N, D = 3, 2, 13, 7
POLYNOMIALS = [{"activation": "polynomial", "degree": p} for p in (1, 2, 3, 4)]
ACTIVATIONS = [{"activation": a} for a in ("relu", "squared_relu", "sigmoid")] + POLYNOMIALS
QUADRATIC = [a for a in ACTIVATIONS if a.get("degree") not in (1, 4)]
WAYS = [(way, a) for way in ("whole", "blocks") for a in QUADRATIC] + [("linear", a) for a in POLYNOMIALS]


def name(value):
    if isinstance(value, dict):
        return " ".join(str(x) for x in value.values())
    return str(value)


every_way = pytest.mark.parametrize("way, phi", WAYS, ids=name)
one_of_each = pytest.mark.parametrize(
    "way, phi",
    [("whole", ACTIVATIONS[2]), *(("blocks", a) for a in ACTIVATIONS[:4:3]), ("linear", POLYNOMIALS[1])],
    ids=name,
)
# PyTorch's own check looks at it
opcheck = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def attend(monkeypatch):
    """Attention with the matrix made whole, in blocks that cut the tokens unevenly, or through features in chunks."""

    def run(way, *heads, block=5, chunk=100, **options):
        monkeypatch.setattr(pointwise, "WHOLE", 8 if way == "whole" else 0)
        monkeypatch.setattr(pointwise, "BLOCK", 512 if way == "whole" else block)
        monkeypatch.setattr(powers, "CHUNK", chunk)
        monkeypatch.setattr(powers, "FEWEST_TOKENS", 3)
        return pointwise_attention(*heads, order="linear" if way == "linear" else "quadratic", **options)

    return run


def definition(q, k, v, weight=None, activation="relu", degree=2, length_exponent=1.0, bias=0.0):
    """The slow way: an explicit matrix for each image and head, each key counted by its weight."""
    weight = q.new_ones(q.shape[0], q.shape[2]) if weight is None else weight.to(q.dtype)
    heads = []
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = q[i, h] @ k[i, h].T / q.shape[3] ** 0.5 + bias
            if activation == "sigmoid":
                matrix = 1 / (1 + torch.exp(-scores))
            elif activation == "polynomial":
                matrix = scores**degree
            else:
                matrix = torch.where(scores > 0, scores, 0) ** (2 if activation == "squared_relu" else 1)
            heads.append((matrix * weight[i]) @ v[i, h] / weight[i].sum() ** length_exponent)
    return torch.stack(heads).view(q.shape)


def draw(n=N, b=B, dtype=torch.float64):
    return [torch.randn(b, HEADS, n, D, dtype=dtype, requires_grad=True) for _ in "qkv"]


def draw_weight(kind, n=N):
    if kind == "mask":
        # never without a real token: that has a test of its own
        return (torch.rand(B, n) < 0.6).index_fill(1, torch.tensor(0), True)
    return torch.rand(B, n, dtype=torch.float64, requires_grad=True) if kind == "weight" else None


@every_way
@pytest.mark.parametrize("kind", [None, "mask", "weight"])
@pytest.mark.parametrize("options", [{}, {"length_exponent": 0.0, "bias": -0.7}, {"length_exponent": 0.5}], ids=name)
def test_each_way_equals_the_definition_in_output_and_gradients(way, phi, kind, options, attend, assert_same):
    q, k, v = draw()
    weight = draw_weight(kind)
    real = weight if kind == "mask" else torch.ones(B, N, dtype=torch.bool)
    found = attend(way, q, k, v, mask=weight, **phi, **options).transpose(1, 2)[real]
    expected = definition(q, k, v, weight, **phi, **options).transpose(1, 2)[real]
    assert_same(found, expected, "output")
    by = torch.randn_like(found)
    inputs = [q, k, v, weight] if kind == "weight" else [q, k, v]
    pairs = (torch.autograd.grad(out, inputs, by) for out in (found, expected))
    for what, a, b in zip(["q", "k", "v", "weight"], *pairs, strict=False):
        assert_same(a, b, f"gradient of {what}")


@pytest.mark.parametrize("way, phi", [w for w in WAYS if w[0] != "whole"], ids=name)
def test_sizes_of_blocks_and_chunks_do_not_matter(way, phi, attend, assert_same):
    heads, weight = draw(), draw_weight("weight")
    by = torch.randn(B, HEADS, N, D, dtype=torch.float64)

    def run(**sizes):
        out = attend(way, *heads, mask=weight, bias=0.3, **phi, **sizes)
        return [out, *torch.autograd.grad(out, [*heads, weight], by)]

    expected = run(block=64, chunk=2**20)
    # 19 and 64 hold more than one head
    for size in (1, 5, 12, 19):
        for what, a, b in zip(
            ["output", "q", "k", "v", "weight"], run(block=size, chunk=40 * size), expected, strict=True
        ):
            assert_same(a, b, f"{what} in blocks of {size}")


@pytest.mark.parametrize("n", [513, 1100])
def test_blocks_and_features_as_they_come_equal_the_definition(n, assert_same):
    q, k, v = (torch.randn(1, 3, n, 5, dtype=torch.float64) for _ in "qkv")
    phi = {"activation": "polynomial", "degree": 2}
    expected = definition(q, k, v, **phi)
    for order in ("quadratic", "linear", "auto"):
        assert_same(pointwise_attention(q, k, v, order=order, **phi), expected, order)
    assert_same(pointwise_attention(q, k, v), definition(q, k, v), "relu")


@every_way
@pytest.mark.parametrize("kind", [None, "weight"])
def test_gradients_equal_finite_differences(way, phi, kind, attend):
    heads = [torch.randn(1, 1, 4, 3, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    weight = None if kind is None else torch.rand(1, 4, dtype=torch.float64, requires_grad=True)

    def out(q, k, v, *w):
        return attend(way, q, k, v, mask=w[0] if w else None, block=3, chunk=12, bias=0.2, **phi)

    assert gradcheck(out, heads if weight is None else [*heads, weight])


@opcheck
@pytest.mark.parametrize("phi", QUADRATIC, ids=name)
def test_the_block_wise_operator_keeps_its_promises_to_pytorch(phi):
    q, k, v = draw(n=5, b=1)
    weight = torch.rand(1, 5, dtype=torch.float64, requires_grad=True)
    rest = (phi["activation"], phi.get("degree", 2), 0.1)
    torch.library.opcheck(torch.ops.sansmax.pointwise_attention.default, (q, k, v, weight, *rest))
    tensors = [x.detach() for x in (torch.randn_like(q), q, k, v, weight)]
    torch.library.opcheck(torch.ops.sansmax.pointwise_attention_backward.default, (*tensors, *rest))


@every_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [None, "mask"])
def test_is_as_accurate_as_plain_torch_in_float32(way, phi, dtype, kind, attend, assert_as_accurate):
    n = 211
    heads = [x.detach().to(dtype).requires_grad_() for x in draw(n)]
    mask = draw_weight(kind, n)
    real = torch.ones(B, n, dtype=torch.bool) if mask is None else mask
    by = torch.randn(int(real.sum()), HEADS, D).to(dtype)

    def results(f, wide):
        x = [h.detach().to(wide).requires_grad_() for h in heads]
        out = f(*x).transpose(1, 2)[real]
        grads = torch.autograd.grad(out, x, by.to(wide))
        return [out, *(g.transpose(1, 2)[real] for g in grads)]

    found = results(lambda *x: attend(way, *x, mask=mask, block=64, chunk=10**5, **phi), dtype)
    plain, exact = (results(lambda *x: definition(*x, mask, **phi), wide) for wide in (torch.float32, torch.float64))
    for what, a, b, c in zip(["output", "q", "k", "v"], found, plain, exact, strict=True):
        # narrow types may lose the rounding of the result, no more
        assert_as_accurate(a, b.to(dtype), c, what)


@one_of_each
@pytest.mark.parametrize("kind", [None, "mask"])
def test_autocast_does_not_lower_the_precision(way, phi, kind, attend):
    heads, mask = draw(31, dtype=torch.float32), draw_weight(kind, 31)
    by = torch.randn(B, HEADS, 31, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(way, *heads, mask=mask, **phi)
        # PyTorch casts in backward, too, where it is run inside, but not in operators that forbid it
        inside = [out, *torch.autograd.grad(out, heads, by)] if way != "whole" else [out]
    out = attend(way, *heads, mask=mask, **phi)
    for a, b in zip(inside, [out, *torch.autograd.grad(out, heads, by)], strict=False):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@every_way
@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_may_hold_anything(way, phi, garbage, attend, assert_same):
    heads, real = draw(b=1), draw_weight("mask")[:1]
    padded = [x.detach().masked_fill(~real[:, None, :, None], garbage).requires_grad_() for x in heads]
    alone = [x.detach()[:, :, real[0]].requires_grad_() for x in heads]
    inside, bag = attend(way, *padded, mask=real, **phi), attend(way, *alone, **phi)
    assert_same(inside[:, :, real[0]], bag, "output")
    assert (inside[:, :, ~real[0]] == 0).all()
    by = torch.randn_like(bag)
    pairs = (torch.autograd.grad(o, i, by) for o, i in ((inside[:, :, real[0]], padded), (bag, alone)))
    for a, b in zip(*pairs, strict=True):
        assert_same(a[:, :, real[0]], b, "gradient")
        assert (a[:, :, ~real[0]] == 0).all()


@one_of_each
@pytest.mark.parametrize("kind", ["mask", "weight"])
def test_an_image_without_real_tokens_is_zero_and_spares_the_others(way, phi, kind, attend, assert_same):
    heads, mask = draw(), draw_weight("mask")
    mask[1] = False
    if kind == "mask":
        with torch.no_grad():
            for x in heads:
                x[1] = float("nan")
    weight = mask if kind == "mask" else mask.double()
    out = attend(way, *heads, mask=weight, **phi)
    assert (out[1] == 0).all()
    assert_same(out[[0, 2]], attend(way, *(x[[0, 2]] for x in heads), mask=weight[[0, 2]], **phi))
    for g in torch.autograd.grad(out.sum(), heads):
        assert g.isfinite().all()
        assert (g[1] == 0).all()


@every_way
def test_nan_in_a_real_token_shows_in_its_own_image_only(way, phi, attend):
    mask = draw_weight("mask")
    for spoilt in range(3):
        heads = [x.detach() for x in draw()]
        heads[spoilt][1, 0, 0, 3] = float("nan")
        out = attend(way, *heads, mask=mask, **phi).transpose(1, 2)
        # a query is read by its own token alone
        tokens = mask[1] if spoilt else torch.arange(N) == 0
        assert out[1, tokens, 0].isnan().any(-1).all()
        assert out[[0, 2]].isfinite().all()


@one_of_each
def test_whole_weights_repeat_tokens(way, phi, attend, assert_same):
    heads, times = draw(b=1), torch.arange(N) % 4
    repeated = attend(way, *(x.repeat_interleave(times, dim=2) for x in heads), **phi)
    found = attend(way, *heads, mask=times.double()[None], **phi).repeat_interleave(times, dim=2)
    assert_same(found, repeated)


@one_of_each
def test_laws_of_permutation_batch_and_linearity(way, phi, attend, assert_same):
    q, k, v = draw()
    out, order, other = attend(way, q, k, v, **phi), torch.randperm(N), torch.randn_like(v)
    assert_same(attend(way, *(x[:, :, order] for x in (q, k, v)), **phi), out[:, :, order], "permuted tokens")
    for i in range(B):
        assert_same(attend(way, *(x[i : i + 1] for x in (q, k, v)), **phi), out[i : i + 1], "one image")
    assert_same(attend(way, q, k, 2 * v - other, **phi), 2 * out - attend(way, q, k, other, **phi), "linear in v")
    # heads and tokens the other way round in memory, as projections leave them
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_same(attend(way, *turned, **phi), out, "strides")


@every_way
def test_one_token_gives_its_value_times_its_score(way, phi, attend, assert_same):
    q, k, v = draw(n=1)
    score = (q * k).sum(-1, keepdim=True) / D**0.5
    relu = score.clamp_min(0)
    expected = {"relu": relu, "squared_relu": relu**2, "sigmoid": torch.sigmoid(score)}
    factor = expected.get(phi["activation"], score ** phi.get("degree", 1))
    assert_same(attend(way, q, k, v, **phi), factor * v)


@pytest.mark.parametrize("n", [32, 33])
def test_auto_takes_the_order_of_fewer_multiplications(n):
    heads = draw(n, dtype=torch.float32)
    # 28 products of two of 7 channels: 1 multiplication to make one, 7 to use it; against n multiplications by 7
    quadratic, linear, auto = (
        pointwise_attention(*heads, activation="polynomial", order=order) for order in ("quadratic", "linear", "auto")
    )
    assert not torch.equal(quadratic, linear)
    assert torch.equal(auto, quadratic if n * 7 <= 28 * 8 else linear)


@pytest.mark.parametrize(
    "options, match",
    [
        (
            {"order": "linear"},
            "order .* with relu, which is no polynomial, must be one of auto, quadratic, got 'linear'",
        ),
        ({"order": "linear", "activation": "sigmoid"}, "with sigmoid, .* must be one of auto, quadratic, got 'linear'"),
        ({"order": "linear", "activation": "polynomial", "degree": 5}, "of degree 5 must be one of auto, quadratic,"),
        ({"activation": "polynomial", "degree": 0}, "degree of a polynomial must be a whole number from 1 on, got 0"),
        ({"activation": "polynomial", "degree": -2}, "from 1 on, got -2"),
    ],
    ids=name,
)
def test_an_order_or_degree_that_the_function_lacks_is_an_error(options, match):
    with pytest.raises(ValueError, match=match):
        pointwise_attention(*draw(3), **options)


CHILD = """
import json, resource, traceback
import torch
from sansmax.ops.pointwise import pointwise_attention

def run(n, d, **options):
    heads = [torch.randn(1, 1, n, d, requires_grad=True) for _ in "qkv"]
    peak = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
    out = pointwise_attention(*heads, **options)
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    out.sum().backward()
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return [p - peak[0] for p in peak[1:]]

products = {"activation": "polynomial", "order": "linear", "degree": 4}
# first of all libraries and threads
run(64, 16), run(64, 16, **products)
memory = [run(16384, 8), run(4096, 16, **products)]

torch.manual_seed(0)
wrong = {}

def draw(b, n):
    return [torch.randn(b, 3, n, 5, requires_grad=True) for _ in "qkv"], torch.rand(b, n)

def compare(name, found, expected):
    for a, b in zip(found, expected, strict=True):
        if not (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max()):
            wrong[name] = f"differs by {(a - b).abs().max()}"

cases = [({"activation": "relu"}, None), ({"activation": "sigmoid"}, "weight")]
for order, kind in {"quadratic": "mask", "linear": "weight", "auto": None}.items():
    cases.append(({"activation": "polynomial", "degree": 3, "order": order}, kind))
for options, kind in cases:
    name = f"{options} {kind}"
    heads, w = draw(2, 13)
    m = {None: None, "mask": w < 0.6, "weight": w.requires_grad_()}[kind]
    inputs = [*heads, w] if kind == "weight" else heads
    f = lambda q, k, v, m: pointwise_attention(q, k, v, mask=m, bias=0.1, **options)
    try:
        torch._dynamo.reset()
        results = []
        for g in (torch.compile(f, backend="aot_eager", fullgraph=True), f):
            out = g(*heads, m)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        compare("compile " + name, *results)
    except Exception:
        wrong["compile " + name] = traceback.format_exc()
    try:
        class Layer(torch.nn.Module):
            forward = staticmethod(f)
        b, n = torch.export.Dim("b"), torch.export.Dim("n")
        shapes = tuple({0: b, 2: n} for _ in "qkv") + (None if m is None else {0: b, 1: n},)
        program = torch.export.export(Layer(), (*heads, m), dynamic_shapes=shapes).module()
        for size in ((3, 7), (2, 29)):
            some, w = draw(*size)
            m = {None: None, "mask": w < 0.6, "weight": w}[kind]
            compare("export " + name, [program(*some, m)], [f(*some, m)])
    except Exception:
        wrong["export " + name] = traceback.format_exc()
print(json.dumps([memory, wrong]))
"""


@pytest.fixture(scope="module")
def child():
    """Peaks of memory, and what went wrong in compiling, of one new process: shapes are not checked there."""
    return answer_of(CHILD)


@pytest.mark.slow
def test_memory_is_linear_in_the_number_of_tokens(child):
    blocks, features = child[0]
    # the matrix has 1 GiB; the tokens 0.5 MiB, some twenty times with gradients and copies in backward
    assert max(blocks) < 16384**2 * 4 / 20, blocks
    # the 3,876 features of all tokens have 61 MiB
    assert max(features) < 4096 * 3876 * 4 / 2, features


@pytest.mark.slow
def test_compiles_whole_and_exports_for_any_batch_and_length(child):
    wrong = child[1]
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())
