"""Slide classifiers: bags side by side, in chunks, masked and weighted give what each bag gives by itself."""

import numpy as np
import pytest
import timm
import torch
from networks import perturbed

import sansmax
from sansmax.engine.chunked import run_chunked
from sansmax.errors import InputError
from sansmax.models.ragged import run_ragged
from sansmax.models.slide import reads_features
from sansmax.models.slide_positions import centred_coords, sincos_positions
from sansmax.ops.moments import merged

NAMES = [name for name in sansmax.models.list_models() if "_slide_" in name]
TRANSFORMERS = [name for name in NAMES if "abmil" not in name]
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "pos_embed": "sincos"}
WIDTH = 13
LENGTHS = (61, 5, 33, 1)
TOKENS = 100

every_network = pytest.mark.parametrize("name", NAMES)


def small(name, **changes):
    """The network, narrow, its parameters all moved off their start."""
    arguments = {"embed_dim": 24, "attn_dim": 7} if "abmil" in name else SMALL
    if name.startswith("soft_"):
        arguments = {**arguments, "attn_options": {"num_landmarks": 7}}
    kept = {"in_features": WIDTH, "num_classes": 3, "dtype": torch.float64}
    return perturbed(timm.create_model(name, **{**kept, **arguments, **changes}))


def draw(n=TOKENS, b=1):
    return torch.randn(b, n, WIDTH, dtype=torch.float64), torch.randint(0, 40, (b, n, 2)).double()


def gradients(model, loss, *inputs):
    return torch.autograd.grad(loss, [*model.parameters(), *inputs], allow_unused=True, materialize_grads=True)


def test_the_networks_are_listed():
    names = "abmil_slide_small seqnorm_slide_base seqnorm_slide_small sima_slide_small soft_slide_small"
    assert [*names.split(), "softmax_slide_small"] == NAMES
    assert all(reads_features(timm.create_model(name, device="meta")) for name in NAMES)
    assert not reads_features(timm.create_model("seqnorm_vit_tiny_patch16_224", device="meta"))


@every_network
def test_bags_side_by_side_give_logits_and_gradients_of_one_bag_at_a_time(name, assert_same):
    model = small(name)
    features, coords = draw()
    features.requires_grad_()
    pairs = zip(features.split(LENGTHS, 1), coords.split(LENGTHS, 1), strict=True)
    alone = torch.cat([model(x, xy) for x, xy in pairs])
    together = model(features, coords, lengths=LENGTHS)
    assert_same(together, alone, "logits")
    by = torch.randn_like(alone)
    # the bag of one token has no variance: its gradients are 1 / sqrt(eps) of the others, and so is their rounding
    loss = [(out * by)[:3].sum() for out in (together, alone)]
    expected = gradients(model, loss[1], features)
    largest = max(g.abs().max().item() for g in expected)
    for a, b in zip(gradients(model, loss[0], features), expected, strict=True):
        assert_same(a, b, "gradient", scale=largest)


@every_network
def test_the_mask_of_bags_side_by_side_counts(name, assert_same):
    model = small(name)
    features, coords = draw()
    mask = torch.rand(1, sum(LENGTHS)) < 0.7
    mask[0, -1] = True
    parts = zip(*(t.split(LENGTHS, 1) for t in (features, coords, mask)), strict=True)
    alone = torch.cat([model(x[m][None], xy[m][None]) for x, xy, m in parts])
    assert_same(model(features, coords, mask, lengths=LENGTHS), alone)


@every_network
def test_padding_may_hold_anything_and_changes_neither_logits_nor_gradients(name, assert_same):
    model = small(name)
    features, coords = draw(23, b=2)
    mask = torch.rand(2, 23) < 0.6
    padded = features.masked_fill(~mask.unsqueeze(-1), torch.nan)
    places = coords.masked_fill(~mask.unsqueeze(-1), torch.nan)
    logits = model(padded, places, mask)
    alone = torch.cat([model(x[m][None], xy[m][None]) for x, xy, m in zip(features, coords, mask, strict=True)])
    assert_same(logits, alone, "logits")
    by = torch.randn_like(alone)
    expected = gradients(model, (alone * by).sum())
    largest = max(g.abs().max().item() for g in expected)
    for a, b in zip(gradients(model, (logits * by).sum()), expected, strict=True):
        assert_same(a, b, "gradient", scale=largest)


@every_network
def test_a_token_of_weight_zero_is_none(name, assert_same):
    model = small(name)
    features, coords = draw(29)
    keep = torch.rand(29) < 0.6
    assert_same(model(features, coords, keep.double()[None]), model(features[:, keep], coords[:, keep]))


@every_network
def test_the_gradient_of_the_weights_is_that_of_the_logits(name):
    model = small(name)
    features, coords = draw(11)
    weight = (0.5 + torch.rand(1, 11, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: model(features, coords, w), weight)
    assert torch.autograd.grad(model(features, coords, weight)[0, 0], weight)[0].abs().min() > 0


@every_network
def test_every_token_twice_gives_the_same_logits(name, assert_same):
    model = small(name)
    # a multiple of the landmarks, so that their groups stay
    features, coords = draw(7 * 9)
    twice = [t.repeat_interleave(2, dim=1) for t in (features, coords)]
    assert_same(model(*twice), model(features, coords))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("soft_")])
def test_the_order_of_the_tokens_does_not_matter(name, assert_same):
    model = small(name)
    features, coords = draw(37)
    order = torch.randperm(37)
    assert_same(model(features[:, order], coords[:, order]), model(features, coords))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_logits_are_the_mean_of_one_logit_per_token(name, assert_same):
    model = small(name)
    features, coords = draw(19)
    x = model.embed_tokens(features, centred_coords(coords))
    for block in model.blocks:
        x = block(x)
    assert_same(model.head(model.norm(x)).mean(1), model(features, coords))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_slide_that_is_shifted_gives_the_same_logits_and_a_stretched_one_does_not(name):
    model = small(name)
    features, coords = draw(31)
    before = model(features, coords)
    torch.testing.assert_close(model(features, coords + torch.tensor([1000.0, -77.0]).double()), before)
    assert (model(features, 2 * coords) - before).abs().max() > 1e-6
    assert (model(features) - before).abs().max() > 1e-6


def test_without_positions_coordinates_change_nothing():
    model = small("seqnorm_slide_small", pos_embed="none")
    features, coords = draw(31)
    assert torch.equal(model(features, coords), model(features))


def test_positions_are_the_sines_and_cosines_of_their_definition(assert_same):
    coords = 100 * torch.randn(2, 5, 2, dtype=torch.float64)
    expected = np.zeros((2, 5, 12))
    for b, n, axis, i in np.ndindex(2, 5, 2, 3):
        angle = coords[b, n, axis].item() * 10000 ** (-i / 3)
        expected[b, n, 6 * axis + i] = np.sin(angle)
        expected[b, n, 6 * axis + 3 + i] = np.cos(angle)
    assert_same(sincos_positions(coords, 12), torch.from_numpy(expected))


def test_gated_attention_is_that_of_its_paper(assert_same):
    model = small("abmil_slide_small")
    features, _ = draw(17)
    expected = np.zeros(24)
    total = 0.0
    for x in features[0]:
        h = (model.embed.weight @ x + model.embed.bias).clamp_min(0)
        v = torch.tanh(model.gate.value.weight @ h + model.gate.value.bias)
        u = 1 / (1 + torch.exp(-(model.gate.gate.weight @ h + model.gate.gate.bias)))
        a = torch.exp((model.gate.score.weight[0] * v * u).sum()).item()
        expected += a * h.detach().numpy()
        total += a
    z = torch.from_numpy(expected / total)
    assert_same(model(features)[0], model.head.weight @ z + model.head.bias)


def test_scores_of_any_size_stay_finite(assert_same):
    model = small("abmil_slide_small")
    with torch.no_grad():
        model.gate.score.weight.mul_(1e4)
    features, _ = draw(17)
    logits = model(features)
    assert logits.isfinite().all()
    parts = [model.summarise_pool(model.embed_tokens(x)) for x in features.split(5, 1)]
    assert_same(model.read_out(parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])), logits)


def test_the_average_of_soft_is_its_sum_over_the_tokens_of_a_landmark(assert_same):
    block = small("soft_slide_small").blocks[0]
    x = torch.randn(2, 7 * 6, 24, dtype=torch.float64)
    own = block.attn(x) - block.attn.proj.bias
    summed = type(block.attn).__mro__[1](24, 2, num_landmarks=7, dtype=torch.float64)
    summed.load_state_dict(block.attn.state_dict())
    assert_same(own, (summed(x) - summed.proj.bias) / 6)
    # in training V and the heads' outputs may be made: the other order gives the same
    block.attn.order = "linear"
    assert_same(block.attn(x) - block.attn.proj.bias, own)


@every_network
def test_the_pieces_of_a_stream_give_the_forward_pass(name, assert_same):
    model = small(name)
    features, coords = draw(53)
    if model.stream_obstacle is not None:
        assert name == "softmax_slide_small" and "no summary of fixed size" in model.stream_obstacle
        return
    places = centred_coords(coords)
    chunks = [model.embed_tokens(x, xy) for x, xy in zip(features.split(11, 1), places.split(11, 1), strict=True)]
    assert model.embed_prefix() is None
    with torch.no_grad():
        x = run_chunked(model.blocks, torch.cat(chunks, dim=1), chunk_tokens=11)
    state = None
    for chunk in x.split(11, 1):
        state = merged(state, model.summarise_pool(chunk))
    assert_same(model.read_out(state), model(features, coords))


@every_network
def test_keeping_the_inputs_of_blocks_only_gives_the_same_gradients(name, assert_same):
    model = small(name)
    features, coords = draw()
    expected = gradients(model, model(features, coords, lengths=LENGTHS).square().sum())
    model.set_grad_checkpointing()
    found = gradients(model, model(features, coords, lengths=LENGTHS).square().sum())
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_stochastic_depth_leaves_out_whole_bags(assert_same):
    model = small("seqnorm_slide_small", drop_path_rate=0.5)
    block = model.blocks[1].train()
    x = torch.randn(1, 600, 24, dtype=torch.float64)
    lengths = [3] * 200
    moved = (run_ragged(block, x, lengths) - x).view(200, 3, 24)
    left_out = (moved == 0).all(2)
    # by both branches: a quarter, and all tokens of a bag alike
    assert (left_out.all(1) == left_out.any(1)).all()
    assert 20 < int(left_out.all(1).sum()) < 80


@every_network
def test_the_classifier_can_be_replaced(name):
    model = small(name)
    features, coords = draw(9)
    assert model.get_classifier() is model.head and timm.get_pretrained_cfg(name).classifier == "head"
    model.reset_classifier(5)
    assert model(features, coords).shape == (1, 5) and model.num_classes == 5
    model.reset_classifier(0)
    assert model(features, coords).shape == (1, 24)
    assert not timm.get_pretrained_cfg(name).has_weights


@every_network
def test_every_parameter_gets_a_gradient(name):
    model = timm.create_model(name, in_features=WIDTH, num_classes=3, dtype=torch.float64)
    features, coords = draw(40)
    loss = model.train()(features, coords).square().sum()
    for (what, _), g in zip(model.named_parameters(), gradients(model, loss), strict=True):
        # what is added to every token alike cancels in sequence normalisation
        if not ("seqnorm" in name and what.endswith("norm1.bias")):
            assert g.abs().max() > 0, what


def test_features_of_another_width_are_refused_naming_both():
    model = small("seqnorm_slide_small")
    with pytest.raises(InputError, match=r"reads features of 13 channels, these have 9.*in_features=9"):
        model(torch.randn(1, 4, 9))


def test_bags_that_do_not_fit_are_refused():
    model = small("sima_slide_small")
    features, _ = draw(10)
    for lengths in ((4, 5), (10, 0), ()):
        with pytest.raises(InputError, match=r"lengths \[.*add up to the tokens"):
            model(features, lengths=lengths)
    with pytest.raises(InputError, match="a bag without tokens has no logits"):
        model(features[:, :0])
    with pytest.raises(InputError, match="pos_embed must be one of none, sincos, got 'learned'"):
        small("sima_slide_small", pos_embed="learned")
    with pytest.raises(InputError, match="multiple of 4, got 22"):
        small("sima_slide_small", embed_dim=22)
