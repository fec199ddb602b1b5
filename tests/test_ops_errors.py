"""What every attention function refuses, and what it says: one contract, and a line for each function."""

import jaxtyping
import pytest
import torch

from sansmax import ops

B, HEADS, N, D, M = 2, 3, 5, 4, 3

# the tensors each function takes, of which q and v are tokens; landmarks are fewer
ATTENTIONS = {
    "softmax": (ops.softmax_attention, ("q", "k", "v")),
    "seqnorm": (ops.seqnorm_attention, ("q", "k", "v")),
    "pointwise": (ops.pointwise_attention, ("q", "k", "v")),
    "sima": (ops.sima_attention, ("q", "k", "v")),
    "soft": (ops.soft_attention, ("q", "v", "landmarks")),
}


@pytest.fixture(autouse=True)
def unchecked_shapes():
    """Shapes in signatures are checked in tests only; here the functions have to see for themselves, as for a user."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(params=ATTENTIONS)
def attention(request):
    """One of the functions, called with tensors that fit but for those given."""
    f, names = ATTENTIONS[request.param]

    def call(mask=None, order="auto", every=None, **changes):
        tensors = {name: torch.randn(B, HEADS, M if name == "landmarks" else N, D) for name in names}
        if every is not None:
            tensors = {name: every(x) for name, x in tensors.items()}
        tensors |= {name: change(tensors[name]) for name, change in changes.items()}
        return f(*tensors.values(), mask=mask, order=order)

    call.name, call.tokens = request.param, [name for name in names if name != "landmarks"]
    return call


def test_what_fits_is_accepted(attention):
    for mask in (None, torch.ones(B, N, dtype=torch.bool), torch.ones(B, N)):
        assert attention(mask).shape == (B, HEADS, N, D)


@pytest.mark.parametrize(
    "change, shape",
    [
        (lambda x: x[:1], r"\(1, 3, 5, 4\)"),
        (lambda x: x[:, :1], r"\(2, 1, 5, 4\)"),
        (lambda x: x[:, :, 1:], r"\(2, 3, 4, 4\)"),
        (lambda x: x[..., 1:], r"\(2, 3, 5, 3\)"),
        (lambda x: x[0], r"\(3, 5, 4\)"),
    ],
    ids=["batch", "heads", "tokens", "channels", "axes"],
)
def test_shapes_that_differ(attention, change, shape):
    first, *others = attention.tokens
    for name in others:
        expected = (
            rf"{first} and {name} must have the same shape \(batch, heads, tokens, head_dim\), got .* and {shape}"
        )
        with pytest.raises(ValueError, match=expected):
            attention(**{name: change})


def test_types_that_differ(attention):
    first, *others = attention.tokens
    for name in others:
        expected = f"{first} and {name} must have the same dtype, got torch.float32 and torch.float64"
        with pytest.raises(ValueError, match=expected):
            attention(**{name: torch.Tensor.double})


def test_tokens_that_are_no_floating_numbers(attention):
    expected = r"q must be of a floating type, got torch.int64; convert it with \.float\(\)"
    with pytest.raises(ValueError, match=expected):
        attention(every=torch.Tensor.long)


@pytest.mark.parametrize("change, shape", [(lambda x: x[0], r"\(3, 5, 4\)"), (lambda x: x[None], r"\(1, 2, 3, 5, 4\)")])
def test_tensors_without_four_axes(attention, change, shape):
    with pytest.raises(ValueError, match=rf"q must be \(batch, heads, tokens, head_dim\), got shape {shape}"):
        attention(every=change)


def test_no_tokens(attention):
    with pytest.raises(ValueError, match=r"q has no tokens, shape \(2, 3, 0, 4\); attention needs at least one"):
        attention(every=lambda x: x[:, :, :0])


def test_a_mask_of_whole_numbers(attention):
    # 1 is a real token for some and padding for others
    with pytest.raises(ValueError, match=r"mask must be boolean .* got torch.int64; .* with mask\.bool\(\)"):
        attention(torch.ones(B, N, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(B, N + 1), (B, 1), (1, N), (N,), (B, HEADS, N), (B, 1, 1, N), (B, N, N)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_another_shape(attention, shape, dtype):
    found = r"\(" + ", ".join(map(str, shape)) + r",?\)"
    with pytest.raises(ValueError, match=rf"one value per image and token, \(2, 5\), got {found}; True = real token"):
        attention(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("order", ["cubic", "", "Linear", "AUTO"])
def test_an_order_that_no_function_has(attention, order):
    with pytest.raises(ValueError, match=rf"order of {attention.name} attention.* one of auto, .*quadratic.*'{order}'"):
        attention(order=order)


def test_the_linear_order_where_there_is_none():
    q, k, v = torch.randn(3, B, HEADS, N, D)
    with pytest.raises(ValueError, match="order of softmax attention must be one of auto, quadratic, got 'linear'"):
        ops.softmax_attention(q, k, v, order="linear")
    for activation in ("relu", "squared_relu", "sigmoid"):
        expected = f"{activation}, which is no polynomial, must be one of auto, quadratic, got 'linear'"
        with pytest.raises(ValueError, match=expected):
            ops.pointwise_attention(q, k, v, order="linear", activation=activation)


def test_an_unknown_activation():
    expected = "one of relu, squared_relu, sigmoid, polynomial, got 'gelu'"
    with pytest.raises(ValueError, match=f"activation of pointwise attention must be {expected}"):
        ops.pointwise_attention(*torch.randn(3, B, HEADS, N, D), activation="gelu")


@pytest.mark.parametrize("name", ["sima", "soft", "pointwise"])
def test_an_implementation_that_is_not_available_is_an_error(name):
    f, tensors = ATTENTIONS[name]
    heads = [torch.randn(B, HEADS, M if t == "landmarks" else N, D) for t in tensors]
    with pytest.raises(ValueError, match=r"impl of \w+ attention must be one of auto, blocks, torch, got 'triton'"):
        f(*heads, impl="triton")


def test_a_kernel_that_cannot_do_what_is_asked_is_an_error():
    x, weight = torch.randn(B, HEADS, N, D), torch.ones(B, N)
    with pytest.raises(ValueError, match=r'impl "blocks" of sima attention takes boolean masks; use impl="torch"'):
        ops.sima_attention(x, x, x, mask=weight, impl="blocks")
    with pytest.raises(ValueError, match=r'impl "blocks" of sima attention has the linear order only'):
        ops.sima_attention(x, x, x, order="quadratic", impl="blocks")
    with pytest.raises(ValueError, match=r'impl "blocks" of second moments takes boolean masks; use impl="torch"'):
        ops.Moments.of(x[0], weight[:1].expand(HEADS, N), impl="blocks")
    with pytest.raises(ValueError, match="impl of second moments must be one of auto, blocks, torch, got 'fast'"):
        ops.Moments.of(x[0], impl="fast")


def test_gains_of_another_shape_are_an_error():
    x = torch.randn(B, HEADS, N, D)
    with pytest.raises(ValueError, match=r"beta_k must have one value per head and channel, \(3, 4\), got \(12,\)"):
        ops.seqnorm_attention(x, x, x, beta_k=torch.zeros(12))


def test_heads_that_do_not_divide_the_width_are_an_error():
    x, w = torch.randn(B, N, 10), torch.randn(10, 10)
    with pytest.raises(ValueError, match="embed_dim 10 is not divisible by num_heads 3"):
        ops.seqnorm_affine(ops.Moments.of(x), w, w, w, w, None, 3)
    state = ops.ProjectedL1State.of(x, torch.cat((w, w)), None)
    with pytest.raises(ValueError, match="embed_dim 10 is not divisible by num_heads 4"):
        ops.sima_affine(state, torch.cat((w, w, w)), None, w, None, 4)
