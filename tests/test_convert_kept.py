"""Conversion keeps everything but the attention: weights, modes, hooks, and that it can be trained."""

import copy

import pytest
import timm
import torch
from originals import GAINS, build, every_network, layers, pictures
from torch import nn

from sansmax.models.convert import convert


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
