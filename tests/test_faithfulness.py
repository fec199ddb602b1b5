"""Scores of bags against tokens truly removed; deletion and insertion curves."""

import math

import numpy as np
import pytest
import timm
import torch
from networks import images, perturbed, small

from sansmax.engine.explain import answer_of, bag_scores, log_odds, token_scores
from sansmax.engine.faithfulness import (
    BATCH_TOKENS,
    Removal,
    bag_answer,
    curves,
    faithfulness,
    image_answer,
    mean_curves,
    removal_effects,
    write_faithfulness,
)
from sansmax.errors import InputError
from sansmax.report.deletion import CurveSet, deletion_figure, mean_height

SLIDE = ("seqnorm_slide_small", "sima_slide_small", "soft_slide_small", "abmil_slide_small")


def network(name, outputs=3, **changes):
    narrow = {"embed_dim": 32, "dtype": torch.float64, "in_features": 10, "num_classes": outputs}
    return perturbed(timm.create_model(name, **{**narrow, **changes}), 0.1)


def bag(n):
    return torch.randn(n, 10, dtype=torch.float64), torch.rand(n, 2, dtype=torch.float64) * 30


def linear(values):
    """An answer to which every token adds its value."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return lambda mask: (mask * values).sum(1)


# Scores of bags


@pytest.mark.parametrize(
    ("name", "task"),
    [(SLIDE[0], task) for task in ("classification", "multilabel", "regression", "survival")]
    + [(name, "classification") for name in SLIDE[1:]],
)
def test_scores_of_a_bag_follow_the_true_effect_of_removing_its_tokens(name, task):
    model = network(name, outputs=1 if task == "survival" else 3)
    n = 400
    features, coords = bag(n)
    index = 0 if task == "survival" else 2
    scores = bag_scores(model, features, coords, index, task)
    # the definition: run the network again on a bag that never had the token; the landmarks of SOFT stay where they are
    absent = 1e-12 if name.startswith("soft") else 0.0
    with torch.no_grad():
        whole = answer_of(model(features[None], coords[None]), index, task)
        effects = []
        for token in range(0, n, 10):
            if absent:
                mask = torch.ones(1, n, dtype=torch.float64)
            else:
                mask = torch.ones(1, n, dtype=torch.bool)
            mask[0, token] = absent
            effects.append(whole - answer_of(model(features[None], coords[None], mask=mask), index, task))
    effects = torch.cat(effects)
    assert torch.corrcoef(torch.stack((scores[::10], effects)))[0, 1] >= 0.99
    # of the same sign and size, too
    assert (scores[::10] - effects).norm() < 0.2 * effects.norm()
    answer = bag_answer(model, features, coords, index, task, absent=absent)
    np.testing.assert_allclose(removal_effects(answer, range(0, n, 10), n), effects, rtol=1e-6, atol=1e-9)
    assert scores.shape == (n,) and not scores.requires_grad


@pytest.mark.parametrize("name", ["seqnorm_slide_small", "sima_slide_small", "abmil_slide_small"])
def test_a_masked_token_is_as_if_it_had_never_been_there(name, assert_same):
    model = network(name)
    features, _ = bag(50)
    answer = bag_answer(model, features, None, 1)
    mask = torch.ones(1, 50, dtype=torch.bool)
    mask[0, [3, 17]] = False
    with torch.no_grad():
        without = log_odds(model(features[mask[0]][None]), 1)
        assert_same(answer(mask), without)


def test_answers_are_those_of_their_tasks(assert_same):
    outputs = torch.randn(4, 3, dtype=torch.float64)
    p = outputs.softmax(1)[:, 1]
    assert_same(answer_of(outputs, 1), (p / (1 - p)).log())
    q = outputs.sigmoid()[:, 2]
    assert_same(answer_of(outputs, 2, "multilabel"), (q / (1 - q)).log())
    assert torch.equal(answer_of(outputs, 0, "regression"), outputs[:, 0])
    assert torch.equal(answer_of(outputs[:, :1], 0, "survival"), outputs[:, 0])


def test_what_cannot_be_explained_is_refused():
    features, _ = bag(5)
    with pytest.raises(InputError, match="need at least 2 classes; the network has 1"):
        bag_scores(network(SLIDE[0], outputs=1), features, None, 0)
    with pytest.raises(InputError, match="class 3 does not exist: the network has classes 0 to 2"):
        bag_scores(network(SLIDE[0]), features, None, 3)
    with pytest.raises(InputError, match="output 3 does not exist: the network has 3"):
        bag_scores(network(SLIDE[0]), features, None, 3, "regression")
    with pytest.raises(InputError, match=r"unknown task 'survivor': did you mean 'survival'\?"):
        bag_scores(network(SLIDE[0]), features, None, 0, "survivor")
    with pytest.raises(InputError, match="an empty bag has no tokens to explain"):
        bag_scores(network(SLIDE[0]), features[:0], None, 0)


# Removal


def test_effects_are_what_each_token_adds():
    values = np.random.default_rng(0).standard_normal(30)
    tokens = [29, 0, 7]
    np.testing.assert_allclose(removal_effects(linear(values), tokens, 30), values[tokens], atol=1e-12)
    found = faithfulness("x", linear(values), values, removed=11)
    assert found.removal.correlation == pytest.approx(1) and found.removal.relative_error < 1e-12
    assert len(found.removal.tokens) == 11 == len(set(found.removal.tokens.tolist()))
    # a wrong factor is seen by the relative error, a wrong sign by both
    doubled = faithfulness("x", linear(values), 2 * values, removed=11).removal
    assert doubled.correlation == pytest.approx(1) and doubled.relative_error == pytest.approx(1)
    assert faithfulness("x", linear(values), -values, removed=11).removal.correlation == pytest.approx(-1)


def test_copies_that_do_not_fit_side_by_side_give_the_same_effects():
    count = BATCH_TOKENS // 2 + 1
    values = np.random.default_rng(0).standard_normal(count)
    done = []
    found = removal_effects(linear(values), [5, 6, 7], count, progress=lambda *now: done.append(now))
    np.testing.assert_allclose(found, values[5:8], atol=1e-9)
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_where_nothing_changes_there_is_no_correlation():
    assert math.isnan(Removal(np.arange(3), np.zeros(3), np.ones(3)).correlation)
    for call in (lambda: removal_effects(linear([1.0]), [0], 1), lambda: curves(linear([1.0]), np.ones(1))):
        with pytest.raises(InputError, match="a bag of one token cannot lose it"):
            call()


def test_scores_of_an_image_are_faithful():
    model = small("seqnorm_vit_pico_patch8_128", depth=3, embed_dim=24, num_heads=3)
    x = images(model, b=1, grid=(16, 16))
    scores = token_scores(model, x, [2])[0].flatten().numpy()
    found = faithfulness("image", image_answer(model, x, 2), scores, removed=40, steps=8, orders=2)
    assert found.removal.correlation >= 0.99 and found.tokens == 256
    areas = found.curves.areas()
    assert areas["deletion"] < areas["random_deletion"] and areas["insertion"] > areas["random_insertion"]
    # scores of nothing are no better than chance: between both curves
    noise = curves(image_answer(model, x, 2), np.random.default_rng(0).standard_normal(256), steps=8, orders=1).areas()
    assert areas["deletion"] < noise["deletion"] and noise["insertion"] < areas["insertion"]


# Curves


def test_curves_remove_and_add_tokens_in_the_order_of_their_scores():
    values = np.array([3.0, -1.0, 2.0, 0.5])
    found = curves(linear(values), values, steps=20, orders=2, seed=1)
    np.testing.assert_allclose(found.removed, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(found.deletion, [4.5, 1.5, -0.5, -1.0])
    np.testing.assert_allclose(found.present, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found.insertion, [3.0, 5.0, 5.5, 4.5])
    assert found.random_deletion.shape == found.random_insertion.shape == (2, 4)
    np.testing.assert_allclose(found.random_deletion[:, 0], 4.5)
    np.testing.assert_allclose(found.random_insertion[:, -1], 4.5)
    assert found.areas()["insertion"] == pytest.approx((3 / 2 + 5 + 5.5 + 4.5 / 2) / 3)
    again = curves(linear(values), values, steps=20, orders=2, seed=1)
    np.testing.assert_array_equal(again.random_deletion, found.random_deletion)


def test_the_area_is_the_mean_height():
    assert mean_height(np.array([0.0, 0.2, 1.0]), np.array([2.0, 2.0, 2.0])) == pytest.approx(2)
    assert mean_height(np.array([0.0, 0.5]), np.array([0.0, 1.0])) == pytest.approx(0.5)


def test_the_page_holds_every_figure_and_says_what_it_means(tmp_path):
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(n) for n in (30, 50)]
    results = [faithfulness(f"bag {k}", linear(v), v, removed=8) for k, v in enumerate(values)]
    page = write_faithfulness(tmp_path, results, title="Are they true?").read_text()
    assert page.startswith("# Are they true?") and "truly removed" in page and "faithfulness.png" in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| bag")]
    assert [row[1:4] for row in rows] == [["30", "8", "1.0000"], ["50", "8", "1.0000"]]
    assert (tmp_path / "faithfulness.png").stat().st_size > 10_000
    assert (tmp_path / "faithfulness.csv").read_text().startswith("name,tokens,removed,correlation,relative_error")
    with pytest.raises(InputError, match="nothing to report on"):
        write_faithfulness(tmp_path, [])


def test_mean_curves_are_read_at_equal_shares():
    def straight(slope, points):
        x = np.linspace(0, 1, points)
        return faithfulness_of(CurveSet(x, x, slope * x, slope * x, slope * x[None], slope * x[None]))

    mean = mean_curves([straight(1.0, 5), straight(3.0, 9)])
    np.testing.assert_allclose(mean.deletion, 2 * mean.removed)
    np.testing.assert_allclose(mean.random_insertion[0], 2 * mean.present)
    texts = [t.get_text() for axes in deletion_figure(mean).axes for t in axes.get_legend().get_texts()]
    assert texts == ["random order, area 1", "by score, area 1"] * 2


def faithfulness_of(drawn):
    from sansmax.engine.faithfulness import Faithfulness

    return Faithfulness("x", 3, Removal(np.arange(2), np.arange(2.0), np.arange(2.0)), drawn)
