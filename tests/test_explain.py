"""Scores of tokens: the effect of removing them, one at a time, to first order."""

import pytest
import torch
from networks import images, small

from sansmax.engine.explain import log_odds, occlusion_scores, token_scores, upsample_scores
from sansmax.errors import InputError

PICO = "seqnorm_vit_pico_patch8_128"


def answer(logits, c):
    """log(p / (1 - p)) by the probabilities."""
    p = logits.double().softmax(1)[:, c]
    return (p / (1 - p)).log()


@torch.no_grad()
def removed(model, x, c, tokens):
    """How much the log-odds fall when each of these tokens is taken away and the network runs again."""
    n = (x.shape[-2] // 8) * (x.shape[-1] // 8)
    whole, effects = answer(model(x), c), []
    for part in tokens.split(64):
        mask = torch.ones(len(part), n, dtype=torch.bool)
        mask[torch.arange(len(part)), part] = False
        effects.append(whole - answer(model(x.expand(len(part), -1, -1, -1), mask), c))
    return torch.cat(effects)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "changes", [{}, {"class_token": True, "global_pool": "token"}, {"attention": "softmax"}], ids=str
)
@pytest.mark.parametrize("c", [0, 6])
def test_scores_are_the_effect_of_removing_each_token(changes, c):
    model = small(PICO, depth=3, embed_dim=24, num_heads=3, **changes)
    x = images(model, b=1, grid=(16, 16))
    scores = token_scores(model, x, [c])[0].flatten()
    effects = removed(model, x, c, torch.arange(256))
    # of the same sign and size, too
    assert relative_error(scores, effects) < 0.2
    assert torch.corrcoef(torch.stack((scores, effects)))[0, 1] >= 0.99


def test_the_error_of_the_first_order_falls_with_the_number_of_tokens():
    model = small(PICO, depth=3, embed_dim=24, num_heads=3)
    errors = []
    for side in (8, 16, 32):
        x = images(model, b=1, grid=(side, side))
        some = torch.randperm(side * side)[:64]
        scores = token_scores(model, x, [1])[0].flatten()[some]
        errors.append(relative_error(scores, removed(model, x, 1, some)))
    # as 1 / n: a quarter at each step
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


def test_each_image_is_asked_for_its_own_class(assert_same):
    model = small(PICO)
    x = images(model, b=3)
    together = token_scores(model, x, [4, 0, 2])
    assert together.shape == (3, 3, 5)
    assert not together.requires_grad
    for i, c in enumerate([4, 0, 2]):
        assert_same(together[i : i + 1], token_scores(model, x[i : i + 1], [c]))
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(token_scores(model, x, [4, 0, 2]), together)


def test_log_odds_are_those_of_the_probabilities(assert_same):
    logits = torch.randn(5, 7, dtype=torch.float64)
    for c in range(7):
        assert_same(log_odds(logits, c), answer(logits, c))
    # two classes: the difference of the logits, also where a probability rounds to 1
    two = torch.tensor([[500.0, -500.0]])
    assert log_odds(two, 0).item() == 1000.0
    assert log_odds(two, 1).item() == -1000.0


@pytest.mark.parametrize("batch_size", [1, 4, 99])
@pytest.mark.parametrize("patch", [8, 11])
def test_occlusion_equals_painting_one_square_at_a_time(patch, batch_size, assert_same):
    model = small(PICO, in_chans=2)
    x = images(model, b=1)
    height, width = x.shape[-2:]
    found = occlusion_scores(model, x, 3, patch, batch_size=batch_size)
    expected = torch.zeros(-(-height // patch), -(-width // patch), dtype=torch.float64)
    with torch.no_grad():
        for i in range(expected.shape[0]):
            for j in range(expected.shape[1]):
                painted = x.clone()
                for row in range(i * patch, min((i + 1) * patch, height)):
                    for column in range(j * patch, min((j + 1) * patch, width)):
                        painted[0, :, row, column] = torch.stack([channel.mean() for channel in x[0]])
                expected[i, j] = (answer(model(x), 3) - answer(model(painted), 3))[0]
    assert_same(found, expected)
    assert not found.requires_grad


def test_upsampled_scores_have_one_value_per_patch():
    scores = torch.randn(3, 5)
    found = upsample_scores(scores, (12, 35))
    assert torch.equal(found, scores.repeat_interleave(4, 0).repeat_interleave(7, 1))


@pytest.mark.parametrize(
    ("classes", "classes_of_network", "message"),
    [
        ([7, 0], 7, "class 7 does not exist: the network has classes 0 to 6"),
        ([0, -1], 7, "class -1 does not exist"),
        ([0, 0], 1, "need at least 2 classes; the network has 1"),
        ([0], 7, r"one class for each image: 2 images, 1 class_index"),
        ([0, 1, 2], 7, r"one class for each image: 2 images, 3 class_index"),
    ],
)
def test_classes_that_do_not_fit_are_errors(classes, classes_of_network, message):
    model = small(PICO, num_classes=classes_of_network)
    with pytest.raises(InputError, match=message):
        token_scores(model, images(model), classes)
