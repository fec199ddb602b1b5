"""Networks of timm with another attention give the numbers of its definition, in every order."""

import copy

import pytest
import torch
from originals import GAINS, OTHERS, PLAIN, build, every_network, layers, pictures

from sansmax.models.attention import SimAAttention, SoftmaxAttention
from sansmax.models.convert import convert
from sansmax.models.vit import VisionTransformer

# The definitions, over heads (b, h, n, d) with an explicit n x n matrix


def by_softmax(q, k, v, layer):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def by_sima(q, k, v, layer):
    q, k = (x / x.abs().sum(-2, keepdim=True) for x in (q, k))
    return q @ k.mT @ v


def by_seqnorm(q, k, v, layer):
    h, n = q.shape[1:3]
    gains = {name: getattr(layer, name).view(h, 1, -1) for name in GAINS}
    q, k, v = (
        gains[f"gamma_{name}"] * (x - x.mean(-2, keepdim=True)) / (x.var(-2, correction=0, keepdim=True) + 1e-6).sqrt()
        + gains[f"beta_{name}"]
        for name, x in (("q", q), ("k", k), ("v", v))
    )
    return q @ k.mT / n @ v


def by_relu(q, k, v, layer):
    return (q @ k.mT / q.shape[-1] ** 0.5).relu() @ v / q.shape[-2]


def by_square(q, k, v, layer):
    return (q @ k.mT / q.shape[-1] ** 0.5).square() @ v / q.shape[-2]


DEFINITIONS = {
    "softmax": by_softmax,
    "sima": by_sima,
    "seqnorm": by_seqnorm,
    "relu": by_relu,
    "polynomial": by_square,
}


def rotated(x, rope, half):
    """Each pair of channels as a complex number, times the number of length 1 that the position has."""
    sin, cos = (y.double() for y in rope.chunk(2, -1))
    turn = torch.complex(cos, sin)
    if half:
        d = x.shape[-1] // 2
        z = torch.complex(x[..., :d].contiguous(), x[..., d:].contiguous()) * turn[..., :d]
        return torch.cat((z.real, z.imag), dim=-1)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn[..., ::2]
    return torch.view_as_real(z).flatten(-2)


def written_out(old, new, definition):
    """What a layer of timm with other attention gives, read from its own weights."""

    def linear(x, weight, *bias):
        return x @ weight.mT + sum(b for b in bias if b is not None)

    def forward(x, rope=None, **others):
        assert not any(others.values())
        if old.qkv is not None:
            q, k, v = linear(x, old.qkv.weight, old.qkv.bias).chunk(3, dim=-1)
            if getattr(old, "q_bias", None) is not None:
                q, v = q + old.q_bias, v + old.v_bias
        else:
            q, k, v = (linear(x, p.weight, p.bias) for p in (old.q_proj, old.k_proj, old.v_proj))
        d = q.shape[-1] // old.num_heads
        q, k, v = (y.unflatten(-1, (-1, d)).transpose(1, 2) for y in (q, k, v))
        if hasattr(old, "q_norm"):
            q, k = old.q_norm(q), old.k_norm(k)
        if rope is not None:
            p, half = old.num_prefix_tokens, getattr(old, "rotate_half", False)
            q, k = (torch.cat((y[:, :, :p], rotated(y[:, :, p:], rope, half)), dim=2) for y in (q, k))
        # a head of keys belongs to as many heads of queries, one after the other
        heads = torch.arange(old.num_heads) * k.shape[1] // old.num_heads
        out = definition(q, k[:, heads], v[:, heads], new).transpose(1, 2).flatten(2)
        if hasattr(old, "norm"):
            out = old.norm(out)
        if getattr(old, "gate", None) is not None:
            out = out / (1 + (-linear(x, old.gate.weight, old.gate.bias)).exp())
        return linear(out, old.proj.weight, old.proj.bias)

    return forward


def reference(original, model, definition):
    """The original, its attention written out with the gains of the converted model."""
    twin, new = copy.deepcopy(original), layers(model)
    for name, old in layers(twin).items():
        old.forward = written_out(old, new[name], definition)
    return twin


def converted_and_moved(original, attention, **options):
    model = convert(copy.deepcopy(original), attention, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".attn.gamma_" in name or ".attn.beta_" in name:
                p += 0.2 * torch.randn_like(p)
    return model


# Numbers


@every_network
def test_softmax_changes_no_output(which, assert_same):
    original, x = build(which), pictures()
    expected = original(x)
    model = convert(copy.deepcopy(original), "softmax")
    assert all(type(layer).__module__.startswith("sansmax.") for layer in layers(model).values())
    assert_same(model(x), expected)
    # the other attention would show
    assert (convert(model, "sima")(x) - expected).abs().max() > 1e-3


@every_network
@pytest.mark.parametrize(
    ("attention", "orders"),
    [
        ("sima", ("auto", "quadratic", "linear")),
        ("seqnorm", ("auto", "quadratic", "linear")),
        ("relu", ("quadratic",)),
        ("polynomial", ("quadratic", "linear")),
    ],
)
def test_the_converted_network_is_its_definition_in_every_order(which, attention, orders, assert_same):
    original, x = build(which), pictures()
    state = torch.get_rng_state()
    for order in orders:
        torch.set_rng_state(state)
        model = converted_and_moved(original, attention, order=order)
        assert_same(model(x), reference(original, model, DEFINITIONS[attention])(x), order)


@pytest.mark.parametrize("which", [w for w in [*PLAIN, *OTHERS] if w != "norms of queries and keys"])
@pytest.mark.parametrize("attention", ["sima", "seqnorm"])
def test_layers_without_terms_have_the_order_of_moments(which, attention, assert_same):
    original, x = build(which), pictures()
    model = converted_and_moved(original, attention, order="moments")
    assert_same(model(x), reference(original, model, DEFINITIONS[attention])(x))


def test_soft_has_its_queries_for_keys(assert_same):
    original, x = build("vit"), pictures()
    # a landmark for each token, and the regularised inverse written out
    n = 7
    model = convert(copy.deepcopy(original), "soft", num_landmarks=n)

    def by_soft(q, k, v, layer):
        kernel = torch.exp(-(q[..., :, None, :] - q[..., None, :, :]).square().sum(-1) / (2 * q.shape[-1] ** 0.5))
        return kernel @ torch.linalg.inv(kernel + 0.01 * torch.eye(n, dtype=q.dtype)) @ kernel.mT @ v

    assert_same(model(x), reference(original, model, by_soft)(x))
    # and back: keys are made of what there is
    again = convert(model, "softmax")
    expected = reference(original, again, lambda q, k, v, layer: by_softmax(q, q, v, layer))
    assert_same(again(x), expected(x))


@pytest.mark.parametrize("attention", ["sima", "relu"])
def test_options_reach_the_layers(attention, assert_same):
    original, x = build("registers"), pictures()
    n, option = 6 + 5, {"sima": {"reference_tokens": 4}, "relu": {"length_exponent": 0.5}}[attention]
    factor = {"sima": n / 4, "relu": n**0.5}[attention]
    model = convert(copy.deepcopy(original), attention, **option)
    expected = reference(original, model, lambda *a: factor * DEFINITIONS[attention](*a))
    assert_same(model(x), expected(x))


@pytest.mark.parametrize("which", ["vit", "distilled", "rotary, eva02, q and v biased"])
def test_only_the_blocks_asked_for_are_converted(which, assert_same):
    original, x = build(which), pictures()
    expected = copy.deepcopy(original)
    expected.blocks[1].attn.forward = written_out(expected.blocks[1].attn, None, by_sima)
    model = convert(copy.deepcopy(original), "sima", blocks=[-1])
    assert_same(model(x), expected(x))
    assert model.attention == "softmax and sima"
    assert isinstance(model, VisionTransformer) == (which == "vit")


def test_blocks_that_are_left_out_of_a_plain_transformer_take_masks_too(assert_same):
    model = convert(build("vit"), "sima", blocks=[1])
    assert [type(block.attn) for block in model.blocks] == [SoftmaxAttention, SimAAttention]
    tokens, mask = torch.randn(1, 6, 48, dtype=torch.float64), torch.tensor([[True, False, True, True, False, True]])
    alone = tokens[:, mask[0]]
    for block in model.blocks:
        tokens, alone = block(tokens, mask), block(alone)
    assert_same(tokens[:, mask[0]], alone)


def test_terms_that_widen_the_queries_do_not_break_autocast():
    model = convert(build("norms of queries and keys"), "sima").float()
    x = pictures().float()
    # as norms do under autocast on some devices
    for block in model.blocks:
        block.attn.q_norm.register_forward_hook(lambda module, inputs, output: output.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    expected = model(x)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
