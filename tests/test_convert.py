"""Networks of timm with another attention: the numbers of its definition, all else as it was."""

import copy
import json

import pytest
import timm
import torch
from apart import assert_nothing_wrong
from networks import perturbed, small
from safetensors.torch import save_file
from timm.models import vision_transformer as timm_vit
from torch import nn

from sansmax.engine.stream import stream_tokens
from sansmax.errors import InputError
from sansmax.models.attention import SeqNormAttention, SimAAttention, SoftmaxAttention
from sansmax.models.attention_soft import SoftAttention
from sansmax.models.attention_terms import SimAWithTerms
from sansmax.models.blocks import Block
from sansmax.models.convert import convert
from sansmax.models.vit import VisionTransformer

GAINS = ("gamma_q", "beta_q", "gamma_k", "beta_k", "gamma_v", "beta_v")

PLAIN = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit3, layer scale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
    "norm before the blocks": ("vit_base_patch16_clip_224", {}),
    "mean of tokens": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "qkv_bias": False}),
    "norms of queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
}
OTHERS = {
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "beside each other": ("vit_small_patch16_18x2_224", {}),
    "norm after": ("vit_tiny_patch16_224", {"block_fn": timm_vit.ResPostBlock, "init_values": 0.1}),
    "beit without bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_abs_pos_emb": True}),
    "eva without rotary": ("eva_giant_patch14_224", {"patch_size": 16}),
}
ROTARY = {
    "eva02, q and v biased": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "eva02, separate projections, norm inside": ("eva02_base_patch16_clip_224", {}),
    "queries and keys normed": ("vit_medium_patch16_rope_reg1_gap_256", {"qk_norm": True}),
    "rotation of each head": ("vit_small_patch16_rope_mixed_224", {}),
    "rotation of halves": ("vit_small_patch16_dinov3", {}),
    "gate": ("eva02_tiny_patch14_224", {"patch_size": 16, "gate": True}),
    "norm after": ("eva02_tiny_patch14_224", {"patch_size": 16, "use_post_norm": True, "scale_attn_inner": True}),
    "keys shared by queries": (
        "eva02_tiny_patch14_224",
        {"patch_size": 16, "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2},
    ),
}
ALL = {**PLAIN, **OTHERS, **{f"rotary, {name}": what for name, what in ROTARY.items()}}

every_network = pytest.mark.parametrize("which", ALL)


def build(which, **changes):
    """The network in small, for 2 x 3 patches, its parameters all moved off their start."""
    name, arguments = ALL[which]
    size = {"img_size": (32, 48), "embed_dim": 48, "num_heads": 4, "depth": 2, "num_classes": 5}
    arguments = {**size, **arguments, **changes}
    gate = arguments.pop("gate", False)
    try:
        model = timm.create_model(name, **arguments)
    except TypeError as e:
        if any(f"'{new}'" in str(e) for new in ("qk_norm", "num_kv_heads", "swiglu_align_to")):
            pytest.skip(f"not in this version of timm: {e}")
        raise
    if gate:
        # no network of timm asks for it by an argument
        if not hasattr(model.blocks[0].attn, "gate"):
            pytest.skip("not in this version of timm: gates")
        for block in model.blocks:
            block.attn.gate = nn.Linear(48, 48)
    return perturbed(model).double()


def pictures(b=3):
    return torch.randn(b, 3, 32, 48, dtype=torch.float64)


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


def layers(model):
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "attn"}


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


def test_blocks_without_attention_can_be_left_out():
    model = build("distilled")
    model.blocks[1] = nn.Identity()
    refused(model, "sima", r"blocks\.1 \(Identity\) has no attention layer of its own; leave it out")
    assert type(convert(model, "sima", blocks=[0]).blocks[0].attn) is SimAWithTerms


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


# What stays


@every_network
@pytest.mark.parametrize("attention", ["seqnorm", "softmax"])
def test_everything_but_attention_stays_the_same(which, attention):
    model = build(which)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
    model.blocks[1].train()
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = dict(model.named_buffers())
    assert convert(model, attention) is model
    after = dict(model.named_parameters(remove_duplicate=False))
    outside = {name for name in before if ".attn." not in name}
    assert {name for name in after if ".attn." not in name} == outside
    assert all(after[name] is before[name][0] for name in outside)
    assert {name for name, _ in model.named_buffers()} == {name for name in buffers if ".attn." not in name}
    kept = {name for name in before if name in after}
    assert kept - outside, "some of the parameters of attention stay, too"
    assert all(after[name].requires_grad == before[name][1] for name in kept)
    assert all(module.training == modes[name] for name, module in model.named_modules() if name in modes)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@every_network
def test_a_frozen_network_stays_frozen_with_its_dropout(which):
    model = build(which, proj_drop_rate=0.25).requires_grad_(False)
    drops = [layer.proj_drop for layer in layers(model).values()]
    convert(model, "seqnorm")
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == set(GAINS)
    assert [layer.proj_drop for layer in layers(model).values()] == drops
    assert {drop.p for drop in drops} == {0.25}


@every_network
def test_where_projections_are_not_joined_all_weights_keep_their_names(which):
    original = build(which)
    separate = {name for name in original.state_dict() if any(f".attn.{n}" in name for n in ("q_", "k_p", "v_"))}
    separate -= {name for name in separate if ".q_norm." in name}
    before, after = original.state_dict(), convert(copy.deepcopy(original), "sima").state_dict()
    joined = {f"blocks.{i}.attn.qkv.{n}" for i in range(2) for n in ("weight", "bias")} if separate else set()
    assert set(before) - set(after) == separate
    assert set(after) - set(before) <= joined
    assert all(torch.equal(before[name], after[name]) for name in set(before) & set(after))


def test_optimisers_and_hooks_of_the_caller_stay_valid():
    model, seen = build("vit"), []
    model.register_forward_hook(lambda *_: seen.append("network"))
    model.blocks[0].register_forward_hook(lambda *_: seen.append("block"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "sima")
    model(pictures()).square().sum().backward()
    assert seen == ["block", "network"]
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_gains_start_as_those_of_a_new_layer_and_are_kept_where_they_are():
    model = convert(build("vit"), "seqnorm")
    layer = model.blocks[0].attn
    assert all((getattr(layer, f"gamma_{x}") == 1).all() for x in "qkv")
    assert not layer.beta_q.any() and not layer.beta_k.any() and 0.005 < layer.beta_v.std() < 0.05
    with torch.no_grad():
        layer.gamma_q.fill_(3.0)
    convert(model, "seqnorm", order="linear")
    assert model.blocks[0].attn is not layer
    assert (model.blocks[0].attn.gamma_q == 3.0).all()


def test_a_network_without_memory_stays_without():
    with torch.device("cpu"):
        model = convert(timm.create_model("vit_tiny_patch16_224", depth=2).to("meta"), "seqnorm")
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("which", ["vit", "distilled", "rotary, eva02, separate projections, norm inside"])
@pytest.mark.parametrize("attention", ["sima", "seqnorm", "relu"])
def test_fine_tuning_lowers_the_loss_and_reaches_every_parameter(which, attention):
    model = convert(build(which), attention).train()
    x, labels = pictures(5), torch.arange(5)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12]
    # biases of the projections cancel in the normalisation over the tokens; so does what the norm before adds
    if attention == "seqnorm":
        dead = [n for n in dead if not n.endswith(("attn.qkv.bias", "norm1.bias"))]
    assert dead == []


# A plain transformer becomes one of this package


@pytest.mark.parametrize("which", PLAIN)
def test_a_plain_transformer_takes_masks_and_images_of_other_sizes(which, assert_same):
    model = convert(build(which), "seqnorm")
    assert isinstance(model, VisionTransformer)
    assert all(isinstance(block, Block) for block in model.blocks)
    assert (type(model.blocks[0].attn) is SeqNormAttention) == (which != "norms of queries and keys")
    x = pictures()
    mask = torch.tensor([[True] * 6, [True, True, False, True, False, True], [False] * 5 + [True]])
    logits = model(x, mask)
    assert_same(logits[:1], model(x[:1]), "nothing masked")
    assert (logits[1:] - model(x)[1:]).abs().max() > 1e-3
    layer, tokens = model.blocks[0].attn, torch.randn(3, 6, 48, dtype=torch.float64)
    for i in range(3):
        out = layer(tokens, mask)[i]
        assert_same(out[mask[i]], layer(tokens[i : i + 1, mask[i]])[0], "as without the masked tokens")
        assert not out[~mask[i]].any()
    other = x.clone()
    # the third patch is in the first row, the fifth in the second
    other[1, :, :16, 32:], other[1, :, 16:, 16:32] = 7.0, -3.0
    assert_same(model(other, mask)[1], logits[1], "pixels of masked patches")
    assert model(torch.randn(2, 3, 64, 16, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("which", [w for w in PLAIN if w != "norms of queries and keys"])
@pytest.mark.parametrize("attention", ["seqnorm", "sima"])
def test_a_plain_transformer_runs_in_chunks(which, attention, assert_same):
    class Picture:
        def __init__(self, pixels):
            self.pixels, self.grid = pixels, (pixels.shape[-2] // 16, pixels.shape[-1] // 16)

        def read(self, first, last):
            return self.pixels[..., first * 16 : last * 16, :]

    model = convert(build(which, img_size=(80, 48)), attention)
    for size in ((80, 48), (112, 32)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            found, expected = stream_tokens(model, Picture(x), chunk_tokens=6).logits, model(x)
        # positions of another grid are resampled in float32
        assert_same(*((found, expected) if size == (80, 48) else (found.float(), expected.float())))


def test_a_layer_with_terms_has_no_summary():
    model = convert(build("norms of queries and keys"), "sima")
    with pytest.raises(InputError, match="cannot run in chunks: sima attention has no summary of fixed size"):
        stream_tokens(model, None)
    assert convert(build("vit"), "sima").stream_obstacle is None


def test_timm_builds_the_dynamic_network_that_conversion_makes(assert_same):
    model = convert(build("vit"), "softmax")
    dynamic = build("vit", dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 16, dtype=torch.float64)
    # other sizes are resampled in float32
    assert_same(model(x).float(), dynamic(x).float())


def test_a_network_of_this_package_changes_its_mechanism(assert_same):
    model = small("seqnorm_vit_tiny_patch16_224", class_token=True)
    twin = small("seqnorm_vit_tiny_patch16_224", class_token=True, attention="sima")
    twin.load_state_dict({n: p for n, p in model.state_dict().items() if ".gamma_" not in n and ".beta_" not in n})
    assert convert(model, "sima") is model
    assert type(model.blocks[0].attn) is SimAAttention
    x, mask = torch.randn(2, 3, 48, 80, dtype=torch.float64), torch.rand(2, 15) < 0.6
    assert_same(model(x, mask), twin(x, mask))
    assert model.conversion["base"] == "seqnorm_vit_tiny_patch16_224"


def test_networks_with_methods_of_their_own_stay_what_they_are():
    class Own(timm_vit.VisionTransformer):
        pass

    model = Own(img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    assert type(convert(model, "sima")) is Own
    assert type(model.blocks[0]) is timm_vit.Block
    assert type(model.blocks[0].attn) is SimAWithTerms
    assert not model.blocks[0].attn.has_terms
    assert model.conversion["base"] is None


# Refusals


REFUSED = {
    "no such mechanism": ("vit", "linear", {}, "attention of convert must be one of softmax, seqnorm, sima, soft"),
    "no such option": ("vit", "sima", {"num_landmarks": 3}, "num_landmarks: no option .* takes eps, order, refer"),
    "size of the layer": ("vit", "sima", {"qkv_bias": False}, "qkv_bias: no option of sima attention"),
    "landmarks by convolution": (
        "vit",
        "soft",
        {"ratio": 2},
        "ratio: no option .* takes inverse, normalized, num_landmarks, order$",
    ),
    "no such order": ("vit", "relu", {"order": "moments"}, "order of pointwise attention"),
    "moments of rotated tokens": (
        "rotary, eva02, q and v biased",
        "sima",
        {"order": "moments"},
        'order "moments" of sima attention needs a layer without rotary positions',
    ),
    "soft and rotary": (
        "rotary, gate",
        "soft",
        {},
        r"soft attention: blocks\.0\.attn has rotary positions and a gate, but the landmarks of SOFT",
    ),
    "soft and norms": (
        "norms of queries and keys",
        "soft",
        {},
        r"blocks\.0\.attn has norms of queries and keys and a norm after the heads",
    ),
    "no such block": ("vit", "sima", {"blocks": [0, 2]}, r"blocks must be numbers from 0 to 1, .* got \[2\]"),
    "no block": ("vit", "sima", {"blocks": []}, "blocks is empty"),
}


def snapshot(model):
    return (
        type(model),
        [(name, type(module), id(module)) for name, module in model.named_modules()],
        [(name, id(p), p._version) for name, p in model.named_parameters()],
        {name: value for name, value in vars(model).items() if not name.startswith("_")},
        copy.deepcopy(getattr(model, "pretrained_cfg", None)),
    )


def refused(model, attention, message, **options):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        convert(model, attention, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_the_network_left_alone(case):
    which, attention, options, message = REFUSED[case]
    refused(build(which), attention, message, **options)


@pytest.mark.parametrize("attention", ["softmax", "sima", "seqnorm", "relu", "soft"])
@pytest.mark.parametrize("bias", ["use_rel_pos_bias", "use_shared_rel_pos_bias"])
def test_a_relative_position_bias_is_refused_by_name(attention, bias):
    biases = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": False, bias: True}
    message = (
        rf"cannot convert to {attention} attention: blocks\.0\.attn adds a relative position bias .*"
        r"without it \(Beit: use_rel_pos_bias=False, use_shared_rel_pos_bias=False\), or leave its block out"
    )
    refused(build("beit without bias", **biases), attention, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_relpos_small_patch16_224", r"blocks\.0\.attn adds a relative position bias"),
        ("samvit_base_patch16", r"blocks\.0\.attn adds a relative position bias"),
        ("vit_dlittle_patch16_reg1_gap_256", r"blocks\.0\.attn is a timm\.\S+\.DiffAttention, which is not known"),
        ("cait_xxs24_224", r"blocks\.0\.attn is a timm\.\S+\.TalkingHeadAttn, which is not known"),
        ("twins_svt_small", r"blocks\.0 \(ModuleList\) has no attention layer"),
    ],
)
def test_other_attention_of_timm_is_refused_by_name(name, message):
    if not timm.is_model(name):
        pytest.skip("not in this version of timm")
    refused(timm.create_model(name), "sima", message)


def test_a_layer_that_cannot_be_read_is_refused_wherever_it_stands():
    model = build("vit", attn_drop_rate=0.1)
    refused(model, "sima", r"blocks\.0\.attn drops attention weights \(p = 0.1\).*use attn_drop_rate=0")
    model = build("vit")
    model.blocks[1].attn = nn.MultiheadAttention(48, 4)
    refused(model, "sima", r"blocks\.1\.attn is a torch\.\S+\.MultiheadAttention, which is not known")
    assert convert(model, "sima", blocks=[0]).attention == "softmax and sima"
    model = convert(build("vit"), "softmax")
    model.blocks[1].attn = SoftAttention(48, 4, value_kernel=3)
    refused(model, "sima", r"blocks\.1\.attn convolves on the grid of tokens")
    model = build("vit")
    model.blocks[1].attn.proj = nn.Linear(48, 36)
    refused(model, "sima", r"blocks\.1\.attn has heads of 48 channels together.* embed_dim, 36")


def test_dropout_in_blocks_that_are_left_out_stays():
    model = build("vit")
    model.blocks[1].attn.attn_drop.p = 0.5
    convert(model, "sima", blocks=[0])
    assert type(model) is timm_vit.VisionTransformer
    assert model.blocks[1].attn.attn_drop.p == 0.5


def test_networks_without_attention_of_their_own_are_refused():
    refused(timm.create_model("resnet10t"), "sima", "ResNet has no `blocks`")
    refused(timm.create_model("mixer_s32_224", num_classes=2), "sima", r"blocks\.0 \(MixerBlock\) has no attention")


@pytest.mark.parametrize("attention", ["sima", "softmax", "soft"])
@pytest.mark.parametrize("which", ["distilled", "eva without rotary"])
def test_masks_for_pairs_of_tokens_are_refused_in_the_forward_pass(attention, which):
    block = convert(build(which), attention).blocks[0]
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot take attn_mask, a term for each pair of tokens; leave it out"):
        block(x, attn_mask=torch.ones(7, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot take is_causal"):
        block.attn(x, is_causal=True)
    with pytest.raises(ValueError, match="cannot take shared_rel_pos_bias"):
        block.attn(x, shared_rel_pos_bias=torch.zeros(4, 7, 7))
    if attention == "soft":
        with pytest.raises(ValueError, match="cannot take rotary positions"):
            block.attn(x, rope=torch.zeros(7, 24))


# Again, from a folder


@pytest.mark.parametrize(
    ("which", "attention", "options"),
    [
        ("vit", "seqnorm", {"order": "linear"}),
        ("registers", "soft", {"num_landmarks": 3, "inverse": "halved"}),
        ("distilled", "sima", {"blocks": [1]}),
        ("rotary, eva02, separate projections, norm inside", "seqnorm", {}),
    ],
)
def test_a_saved_network_is_built_again_by_timm(which, attention, options, tmp_path, assert_same):
    model = convert(build(which).float(), attention, **options)
    assert model.pretrained_cfg["architecture"] == "converted"
    assert model.conversion["base"] == ALL[which][0]
    arguments = {"embed_dim": 48, "num_heads": 4, "depth": 2, "img_size": [32, 48], **ALL[which][1]}
    config = {
        "architecture": "converted",
        "num_classes": 5,
        "model_args": {**arguments, **model.conversion},
        "pretrained_cfg": {"input_size": [3, 32, 48], "classifier": model.pretrained_cfg["classifier"]},
    }
    config["pretrained_cfg"]["first_conv"] = "patch_embed.proj"
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({n: p.contiguous() for n, p in model.state_dict().items()}, tmp_path / "model.safetensors")
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is type(model)
    assert (again.conversion, again.attention) == (model.conversion, model.attention)
    x = pictures().float()
    assert torch.equal(again(x), model(x))
    fewer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2)
    assert fewer.blocks[0].norm1.weight.equal(model.blocks[0].norm1.weight)
    assert fewer(x).shape == (3, 2)


def test_conversions_one_after_the_other_are_built_again():
    model = convert(convert(build("vit"), "sima"), "seqnorm", blocks=[1], order="linear")
    assert model.attention == "sima and seqnorm"
    size = {"img_size": (32, 48), "embed_dim": 48, "num_heads": 4, "depth": 2, "num_classes": 5}
    again = timm.create_model("converted", **size, **json.loads(json.dumps(model.conversion)))
    assert [type(b.attn) for b in again.blocks] == [SimAAttention, SeqNormAttention]
    assert again.blocks[1].attn.order == "linear"
    assert again.conversion == model.conversion
    assert convert(again, "softmax").conversion == {
        "base": "vit_tiny_patch16_224",
        "attention": "softmax",
        "attn_options": {},
        "blocks": None,
    }
    assert type(again.blocks[0].attn) is SoftmaxAttention


def test_the_network_converted_takes_arguments_of_its_base():
    model = timm.create_model("converted", base="deit3_small_patch16_224", attention="sima", depth=1, num_classes=4)
    plain = timm.create_model("deit3_small_patch16_224", depth=1, num_classes=4)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert model.pretrained_cfg["architecture"] == "converted"
    assert model.pretrained_cfg["mean"] == plain.pretrained_cfg["mean"]
    maps = timm.create_model("converted", base="vit_tiny_patch16_224", depth=2, features_only=True, out_indices=(0, 1))
    assert [m.shape for m in maps(torch.randn(1, 3, 224, 224))] == [(1, 192, 14, 14)] * 2
    with pytest.raises(ValueError, match="needs the name of the one to convert"):
        timm.create_model("converted")


def test_pretrained_weights_of_the_base_are_there_before_the_conversion(tmp_path):
    source = timm.create_model("deit_tiny_patch16_224", depth=1)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    calls = []
    make = timm.create_model

    def create(name, pretrained=False, **kwargs):
        calls.append((name, pretrained))
        overlay = {"file": str(tmp_path / "model.safetensors")}
        return make(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sansmax.models.convert.timm.create_model", create)
        model = make("converted", base="deit_tiny_patch16_224", attention="seqnorm", pretrained=True, depth=1)
    assert calls == [("deit_tiny_patch16_224", True)]
    state = model.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in source.state_dict().items())


# Compilers: in an interpreter of their own, since checked shapes break the graph

COMPILED = """
import json, traceback
import torch, timm, sansmax
from sansmax.models.convert import convert

torch.manual_seed(0)
size = dict(embed_dim=32, num_heads=2, depth=1, num_classes=3)
networks = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=48), "seqnorm"),
    "distilled": ("deit_tiny_distilled_patch16_224", dict(img_size=48), "relu"),
    "rotary": ("eva02_tiny_patch14_224", dict(patch_size=16, img_size=48), "sima"),
}
wrong = {}
for name, (base, changes, attention) in networks.items():
    model = convert(timm.create_model(base, **size, **changes), attention).eval()
    x = torch.randn(4, 3, 48, 48)
    try:
        expected = model(x)
        by = torch.autograd.grad(expected.square().sum(), list(model.parameters()), allow_unused=True)
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        also = torch.autograd.grad(found.square().sum(), list(model.parameters()), allow_unused=True)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("b", min=2)}}).module()
        pairs = [(found, expected), (program(x), expected), (program(x[:3]), model(x[:3]))]
        pairs += [(a, b) for a, b in zip(also, by) if b is not None]
        off = max(((a - b).abs().max() / max(1.0, b.abs().max())).item() for a, b in pairs)
        if not off <= 1e-5:
            wrong[name] = f"differs by {off}"
    except Exception:
        wrong[name] = traceback.format_exc()
print(json.dumps(wrong))
"""


def test_converted_networks_compile_whole_and_export():
    assert_nothing_wrong(COMPILED)
