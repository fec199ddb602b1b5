"""CvT against the published code, SimA on CvT against its definition, and what holds for both."""

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from apart import assert_nothing_wrong
from networks import gradients, perturbed
from published import picture, reference, weights
from timm.models import group_parameters
from torch import nn

from sansmax.models.cvt import checkpoint_filter_fn, softmax_of_width
from sansmax.ops import sima_attention, sima_of_keys

ACTIVATIONS = {"microsoft": "quick_gelu", "transformers": "gelu"}
ATTENTIONS = ("softmax", "sima")
SMALL = {"embed_dims": (12, 20, 36), "depths": (2, 1, 2), "num_heads": (2, 4, 3), "num_classes": 7}

published = pytest.mark.parametrize("code", list(ACTIVATIONS))
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)


def small(attention, **changes):
    """A narrow network whose parameters and statistics are all moved off their start."""
    model = timm.create_model("cvt_13", **{**SMALL, "attention": attention, "dtype": torch.float64, **changes})
    if changes.get("device") == "meta":
        return model
    for name, x in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            x += 0.3 * torch.rand_like(x)
    return perturbed(model)


def images(b=2, size=(33, 50)):
    return torch.randn(b, 3, *size, dtype=torch.float64)


def shapes_of(model):
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def published_shapes(file):
    return {name: tuple(shape) for name, shape in reference(file)["meta"]["shapes"].items()}


# The published code


@published
@pytest.mark.parametrize("size", ["13", "small"])
def test_logits_are_those_of_the_published_code(code, size, assert_same):
    file = reference(f"cvt_{size}_{code}")
    model = timm.create_model("cvt_13", act_layer=ACTIVATIONS[code], dtype=torch.float64, **file["meta"]["arguments"])
    model.eval().load_state_dict(checkpoint_filter_fn(weights(published_shapes(f"cvt_{size}_{code}")), model))
    sizes = [name.removeprefix("logits_") for name in file if name.startswith("logits_")]
    assert len(sizes) == {"13": 2, "small": 5}[size]
    for name in sizes:
        with torch.no_grad():
            found = model(picture(*map(int, name.split("x"))))
        assert_same(found, torch.from_numpy(file[f"logits_{name}"]), name)


@published
@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "sima_cvt_13", "sima_cvt_21"])
def test_names_and_shapes_are_the_published_ones_after_mapping(code, name):
    model = timm.create_model(name, device="meta")
    theirs = {n: torch.empty(s, device="meta") for n, s in published_shapes(f"{name[-6:]}_{code}").items()}
    mapped = {n: tuple(x.shape) for n, x in checkpoint_filter_fn(theirs, model).items()}
    assert mapped == shapes_of(model)
    assert len(mapped) == len(theirs)
    if code == "microsoft":  # the order is theirs too
        assert list(mapped) == list(shapes_of(model))


def test_the_activation_is_the_authors_unless_another_is_asked_for():
    file = reference("cvt_small_microsoft")
    model = timm.create_model("cvt_13", dtype=torch.float64, **file["meta"]["arguments"])
    x = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(model.stages[0].blocks[0].mlp.act(x), x / (1 + torch.exp(-1.702 * x)))


def test_names_of_this_package_and_unknown_ones_are_kept():
    model = small("sima")
    state = {**model.state_dict(), "head_dist.weight": torch.zeros(7, 36)}
    found = checkpoint_filter_fn(state, model)
    assert list(found) == list(state)
    assert all(found[n] is state[n] for n in state)


@pytest.mark.parametrize(("name", "parameters", "table"), [("13", 19_997_480, 20), ("21", 31_622_696, 32)])
def test_numbers_of_parameters_are_the_published_ones(name, parameters, table):
    for kind in ("cvt", "sima_cvt"):
        model = timm.create_model(f"{kind}_{name}", device="meta")
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert round(parameters / 1e6) == table


# SimA


def by_pairs(q, k, v, eps=1e-12):
    """The definition, with a matrix of all pairs; norms run over the tokens of each alone."""
    return (F.normalize(q, p=1.0, dim=-2, eps=eps) @ F.normalize(k, p=1.0, dim=-2, eps=eps).mT) @ v


def definition(w, x, depths, num_heads):
    """CvT in float64 from the weights by name, its softmax replaced by l1 norms over tokens."""

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def convolved(x, name, stride):
        x = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=1, groups=x.shape[1])
        bn = [w[f"{name}.bn.{part}"].reshape(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")]
        return (x - bn[0]) / (bn[1] + 1e-5).sqrt() * bn[2] + bn[3]

    for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        embed = f"stages.{i}.patch_embed"
        stride, padding = ((4, 2), (2, 1), (2, 1))[i]
        x = F.conv2d(x, w[f"{embed}.proj.weight"], w[f"{embed}.proj.bias"], stride=stride, padding=padding)
        b, c, height, width = x.shape
        x = norm(x.permute(0, 2, 3, 1).reshape(b, -1, c), f"{embed}.norm")
        cls = w["stages.2.cls_token"].expand(b, -1, -1) if i == 2 else x[:, :0]
        x = torch.cat((cls, x), dim=1)
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}"
            y = norm(x, f"{block}.norm1")
            grid = y[:, cls.shape[1] :].reshape(b, height, width, c).permute(0, 3, 1, 2)
            heads_of = {}
            for part, by in (("q", 1), ("k", 2), ("v", 2)):
                tokens = convolved(grid, f"{block}.attn.conv_{part}", by).permute(0, 2, 3, 1).reshape(b, -1, c)
                tokens = linear(torch.cat((y[:, : cls.shape[1]], tokens), dim=1), f"{block}.attn.{part}")
                heads_of[part] = tokens.reshape(b, -1, heads, c // heads).permute(0, 2, 1, 3)
            attended = by_pairs(**heads_of).permute(0, 2, 1, 3).reshape(b, -1, c)
            x = x + linear(attended, f"{block}.attn.proj")
            hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.fc2")
        cls, x = x[:, : cls.shape[1]], x[:, cls.shape[1] :].reshape(b, height, width, c).permute(0, 3, 1, 2)
    return linear(norm(cls[:, 0], "norm"), "head")


@pytest.mark.parametrize("size", [(33, 70), (97, 50), (64, 64), (9, 5), (3, 3)], ids=str)
def test_logits_with_sima_are_those_of_the_definition(size, assert_same):
    model = small("sima")
    x = images(size=size)
    with torch.no_grad():
        assert_same(model(x), definition(model.state_dict(), x, SMALL["depths"], SMALL["num_heads"]))


def test_logits_of_the_whole_network_with_sima_are_those_of_the_definition(assert_same):
    model = timm.create_model("sima_cvt_13", dtype=torch.float64).eval()
    w = weights(shapes_of(model))
    model.load_state_dict(w)
    x = picture(96, 160)
    with torch.no_grad():
        found = model(x)
        assert_same(found, definition(w, x, (1, 2, 10), (1, 3, 6)))
        # attention weighs in the logits, or the comparison would say little
        model.load_state_dict({n: torch.zeros_like(t) if n.endswith("attn.proj.weight") else t for n, t in w.items()})
        assert (model(x) - found).abs().max() > 1e-3 * found.abs().max()


def heads(n, m, d=5, dtype=torch.float64):
    return [torch.randn(2, 3, tokens, d, dtype=dtype) for tokens in (n, m, m)]


@pytest.mark.parametrize(("n", "m"), [(13, 7), (7, 13), (1, 1), (3, 1), (11, 11)])
def test_queries_and_keys_are_normalised_over_their_own_tokens(n, m, assert_same):
    q, k, v = heads(n, m)
    assert_same(sima_of_keys(q, k, v), by_pairs(q, k, v))
    if n == m:
        assert_same(sima_of_keys(q, k, v), sima_attention(q, k, v))


def test_a_channel_that_is_zero_on_every_token_adds_nothing(assert_same):
    q, k, v = heads(13, 7)
    q[..., 1], k[..., 3] = 0.0, 0.0
    kept = [0, 2, 4]
    assert_same(sima_of_keys(q, k, v)[..., kept], by_pairs(q[..., kept], k[..., kept], v)[..., kept])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_narrow_types_sima_is_no_less_accurate_than_its_definition(dtype, assert_as_accurate):
    narrow = heads(397, 101, dtype=dtype)
    assert_as_accurate(sima_of_keys(*narrow), by_pairs(*narrow), by_pairs(*(x.double() for x in narrow)))


def test_autocast_leaves_the_sums_of_sima_alone():
    q, k, v = heads(397, 101, dtype=torch.float32)
    expected = sima_of_keys(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sima_of_keys(q, k, v), expected)


def test_softmax_divides_by_the_root_of_the_whole_width(assert_same):
    q, k, v = heads(13, 7)
    assert_same(softmax_of_width(q, k, v), torch.softmax(q @ k.mT / 15**0.5, dim=-1) @ v)


# Both


@every_attention
@pytest.mark.parametrize("size", [(3, 3), (4, 17), (33, 50), (64, 64)], ids=str)
def test_images_of_any_size_do_not_see_their_batch_mates(attention, size, assert_same):
    model = small(attention)
    x = images(b=3, size=size)
    logits = model(x)
    assert logits.isfinite().all()
    for i in range(3):
        assert_same(model(x[i : i + 1]), logits[i : i + 1])
    x[0] = float("nan")
    assert_same(model(x)[1:], logits[1:], "beside NaN")


@pytest.mark.parametrize("size", [(2, 40), (40, 1)])
def test_images_too_small_for_the_first_convolution_are_refused(size):
    with pytest.raises(ValueError, match=f"at least 3 x 3 pixels, got {size[0]} x {size[1]}"):
        small("sima")(images(size=size))


def test_attentions_activations_and_heads_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="attention of CvT must be one of softmax, sima, got 'soft'"):
        timm.create_model("cvt_13", attention="soft", device="meta")
    with pytest.raises(ValueError, match=r"act_layer must be .* got 'gleu'"):
        timm.create_model("cvt_13", act_layer="gleu", device="meta")
    with pytest.raises(ValueError, match="embed_dim 192 is not divisible by num_heads 5"):
        timm.create_model("cvt_13", num_heads=(1, 5, 6), device="meta")


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "sima_cvt_13", "sima_cvt_21"])
def test_sizes_and_default_configurations_are_the_published_ones(name):
    model, cfg = timm.create_model(name, device="meta"), timm.get_pretrained_cfg(name)
    assert [len(stage.blocks) for stage in model.stages] == {"13": [1, 2, 10], "21": [1, 4, 16]}[name[-2:]]
    assert [info["num_chs"] for info in model.feature_info] == [64, 192, 384]
    assert [stage.blocks[0].attn.num_heads for stage in model.stages] == [1, 3, 6]
    assert {b.attn.attention for s in model.stages for b in s.blocks} == {"sima" if "sima" in name else "softmax"}
    assert cfg.paper_ids == ("arXiv:2206.08898" if "sima" in name else "arXiv:2103.15808")
    assert cfg.license and cfg.origin_url and not cfg.has_weights
    assert (cfg.input_size, cfg.crop_pct, cfg.interpolation) == ((3, 224, 224), 0.875, "bicubic")
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert model.get_submodule(cfg.first_conv).in_channels == 3
    assert model.get_submodule(cfg.classifier).out_features == cfg.num_classes == 1000


@every_attention
def test_arguments_of_timm_are_taken(attention):
    model = small(attention, num_classes=5, in_chans=2, img_size=96, drop_path_rate=0.3, global_pool="avg")
    x = images()[:, :2]
    assert model(x).shape == (2, 5)
    tokens = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
    rates = [[getattr(b.drop_path1, "drop_prob", 0.0) for b in stage.blocks] for stage in model.stages]
    # as published: in the last stage alone, from 0 on
    assert rates == [[0.0, 0.0], [0.0], [0.0, pytest.approx(0.3)]]


@every_attention
def test_features_only_gives_maps_of_a_quarter_an_eighth_and_a_sixteenth(attention, assert_same):
    x, model = images(size=(64, 96)), small(attention)
    features = small(attention, features_only=True)
    assert (features.feature_info.reduction(), features.feature_info.channels()) == ([4, 8, 16], [12, 20, 36])
    features.load_state_dict({f"model.{n}": p for n, p in model.state_dict().items()}, strict=False)
    maps = features(x)
    assert [tuple(m.shape) for m in maps] == [(2, 12, 16, 24), (2, 20, 8, 12), (2, 36, 4, 6)]
    first, cls = model.stages[0](x)
    assert cls is None
    assert_same(maps[0], first, "first")
    assert_same(maps[1], model.stages[1](maps[0])[0], "second")
    last, cls = model.stages[2](maps[1])
    assert_same(maps[2], last, "third")
    assert_same(model.head(model.norm(cls[:, 0])), model(x), "logits")


@every_attention
def test_every_parameter_learns_but_those_that_softmax_cancels(attention):
    model = small(attention).train()
    for _ in range(2):
        loss = F.cross_entropy(model(images(b=5)), torch.arange(5))
        grads = gradients(model, loss)
    names = [n for n, _ in model.named_parameters()]
    # rounding of gradients that vanish is near 1e-18
    dead = {n for n, g in zip(names, grads, strict=True) if not (g.abs().max() > 1e-12)}
    # what is added to all keys adds the same to every score of a query; the class token's key has no convolution
    cancelled = {n for n in names if n.endswith("attn.k.bias")}
    cancelled |= {n for n in names if n.endswith("conv_k.bn.bias") and "stages.2" not in n}
    # of the last block only the class token is read, whose query has no convolution; SimA's norm counts the others
    cancelled |= {n for n in names if "stages.2.blocks.1.attn.conv_q" in n}
    assert dead == (cancelled if attention == "softmax" else set())


@every_attention
def test_evaluation_is_deterministic_and_training_is_not(attention):
    rates = {"drop_rate": 0.5, "pos_drop_rate": 0.5, "proj_drop_rate": 0.5, "drop_path_rate": 0.5}
    model, x = small(attention, **rates), images(b=32, size=(17, 17))
    assert torch.equal(model(x), model(x))
    droppers = [m for m in model.modules() if getattr(m, "p", getattr(m, "drop_prob", 0.0))]
    # of the head, of each stage, three of each block, and two paths in the last block
    assert len(droppers) == 1 + 3 + 3 * 5 + 2
    for module in droppers:
        module.train()
        assert not torch.equal(model(x), model(x)), f"{type(module).__name__} drops nothing"
        module.eval()


@every_attention
def test_weight_decay_and_layers_of_learning_rates_know_every_parameter(attention):
    model = small(attention)
    by_decay = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for group in by_decay if group["weight_decay"] for p in group["params"]}
    assert decayed == {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    groups = group_parameters(model, model.group_matcher(coarse=False))
    of = {n: number for number, names in groups.items() for n in names}
    assert sorted(of) == sorted(names.values())
    order = ["stages.0.patch_embed.", "stages.0.blocks.0.", "stages.0.blocks.1.", "stages.1.patch_embed."]
    order += ["stages.1.blocks.0.", "stages.2.patch_embed.", "stages.2.blocks.0.", "stages.2.blocks.1.", "head."]
    numbers = [{number for n, number in of.items() if n.startswith(start)} for start in order]
    assert [len(found) for found in numbers] == [1] * len(order)
    flat = [min(found) for found in numbers]
    # the convolution that starts a stage may go with its first block
    assert flat == sorted(flat)
    assert len(set(flat)) >= 1 + 5 + 1
    assert of["stages.2.cls_token"] == of["stages.2.patch_embed.proj.weight"]


def test_weights_made_on_no_device_can_be_initialised():
    model = small("sima", device="meta", dtype=torch.float32)
    # deterministic mode fills the new memory with NaN
    model.to_empty(device="cpu").init_weights()
    state = model.state_dict()
    assert all(x.isfinite().all() for x in state.values())
    for name, x in state.items():
        if name.endswith(("norm1.weight", "bn.weight", "running_var")):
            assert (x == 1).all()
        elif name.endswith((".bn.bias", "norm.bias", "running_mean", "q.bias", "fc1.bias", "head.bias")):
            assert (x == 0).all()
        elif name.endswith(("fc1.weight", "cls_token")):
            assert 0.012 < x.std() < 0.028


# Compilers: in an interpreter of their own, since checked shapes break the graph

COMPILED = """
import json, traceback
import torch, timm, sansmax.models.cvt

torch.manual_seed(0)
wrong = {}

def compare(name, found, expected):
    for a, b in zip(found, expected, strict=True):
        if not (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max()):
            wrong[name] = f"differs by {(a - b).abs().max()}"

for attention in ("softmax", "sima"):
    model = timm.create_model("cvt_13", attention=attention, **SMALL).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    x = torch.randn(2, 3, 33, 50)
    try:
        torch._dynamo.reset()
        results = []
        for f in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
            out = f(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
        compare(f"compiled {attention}", *results)
        shapes = {"x": {0: torch.export.Dim("b")}}
        program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
        for b in (2, 5):
            some = torch.randn(b, 3, 33, 50)
            compare(f"exported {attention}", [program(some)], [model(some)])
    except Exception:
        wrong[attention] = traceback.format_exc()
print(json.dumps(wrong))
"""


@pytest.mark.slow
def test_networks_compile_whole_and_export_for_any_batch():
    text = COMPILED.replace("**SMALL", f"**{SMALL | {'depths': (1, 1, 1)}!r}")
    assert_nothing_wrong(text)
