"""Gradients through an image larger than memory are those of the forward pass in memory, whatever the store."""

import gc
import tempfile

import numpy as np
import pytest
import torch
from networks import small

from sansmax.data.tokens import PixelSource
from sansmax.engine.stores import STORES
from sansmax.engine.stream_training import streamed_logits
from sansmax.errors import InputError

PICO = "seqnorm_vit_pico_patch8_128"
PIXELS = np.random.default_rng(0).integers(0, 256, (61, 45), dtype=np.uint8)


def in_memory(model):
    rows = -(-len(PIXELS) // 8)
    return model(PixelSource(PIXELS, 8, in_chans=1, mean=(0.5,), std=(0.5,)).read(0, rows).double())


@pytest.mark.parametrize("changes", [{}, {"class_token": True, "pos_embed": "learn", "img_size": (64, 48)}], ids=str)
@pytest.mark.parametrize("attention", ["seqnorm", "sima", "soft"])
@pytest.mark.parametrize(("store", "keep_every"), [(s, k) for s in STORES for k in (1, 2)])
def test_logits_and_every_gradient_are_those_in_memory(store, keep_every, attention, changes, assert_same):
    model = small(PICO, attention=attention, **changes)
    by = torch.randn(1, 7, dtype=torch.float64)
    found = streamed_logits(model, PIXELS, chunk_tokens=7, store=store, keep_every=keep_every)
    parameters = dict(model.named_parameters())
    mine = torch.autograd.grad(found, list(parameters.values()), by)
    expected = in_memory(model)
    theirs = torch.autograd.grad(expected, list(parameters.values()), by)
    assert_same(found, expected, "logits")
    for name, a, b in zip(parameters, mine, theirs, strict=True):
        assert_same(a, b, f"gradient of {name}", scale=max(1.0, b.abs().max().item()))


def test_a_step_of_an_optimiser_is_that_in_memory(assert_same):
    models = [small(PICO), None]
    models[1] = small(PICO)
    models[1].load_state_dict(models[0].state_dict())
    for model, forward in zip(models, (lambda m: streamed_logits(m, PIXELS, chunk_tokens=9), in_memory), strict=True):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(forward(model.train()), torch.tensor([3])).backward()
            optimiser.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert_same(a, b, name)


def test_frozen_parameters_have_no_gradient_and_the_others_theirs(assert_same):
    model = small(PICO)
    for frozen in (model.patch_embed, model.blocks[0]):
        frozen.requires_grad_(False)
    streamed_logits(model, PIXELS)[0, 1].backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert {name for name, g in found.items() if g is None} == {
        name for name, _ in model.named_parameters() if name.startswith(("patch_embed", "blocks.0"))
    }
    model.zero_grad()
    in_memory(model)[0, 1].backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_same(found[name], p.grad, name, scale=max(1.0, p.grad.abs().max().item()))


@pytest.mark.parametrize("end", ["backward", "forgotten"])
def test_temporary_files_go_after_backward_or_with_the_logits(end, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    logits = streamed_logits(small(PICO), PIXELS, store="disk")
    assert list(tmp_path.rglob("tokens*"))
    if end == "backward":
        logits.sum().backward()
    else:
        del logits
        gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_without_gradients_nothing_is_kept(tmp_path, monkeypatch, assert_same):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = small(PICO)
    with torch.no_grad():
        found = streamed_logits(model, PIXELS, store="disk")
    assert not found.requires_grad
    assert_same(found, in_memory(model))
    assert list(tmp_path.iterdir()) == []


def test_a_weight_changed_before_backward_is_noticed():
    model = small(PICO)
    logits = streamed_logits(model, PIXELS)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"proj_drop_rate": 0.1}, {}, r"the network draws random numbers in training \(pos_drop|the network draws"),
        ({}, {"keep_every": 0}, "keep_every must be at least 1, got 0"),
        ({}, {"store": "tape"}, "store must be one of memory, disk, recompute, got 'tape'"),
        ({"attention": "relu"}, {}, "relu attention has no summary of fixed size"),
    ],
)
def test_what_does_not_fit_is_an_error(changes, options, message):
    with pytest.raises(InputError, match=message):
        streamed_logits(small(PICO, **changes).train(), PIXELS, **options)


def test_progress_counts_to_its_total():
    seen = []
    streamed_logits(small(PICO), PIXELS, chunk_tokens=7, progress=lambda *now: seen.append(now)).sum().backward()
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
