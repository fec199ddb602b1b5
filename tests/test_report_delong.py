"""DeLong's variance and test against the O(mn) definition, worked values, and simulation."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sansmax.errors import InputError
from sansmax.report.delong import auc_interval, delong_test, midranks


def definition(positive, scores):
    """Area and structural components from every pair, as DeLong et al. write them."""
    x, y = scores[positive], scores[~positive]
    psi = np.array([[1.0 if a > b else 0.5 if a == b else 0.0 for b in y] for a in x])
    return psi.mean(), psi.mean(axis=1), psi.mean(axis=0)


def covariance_by_definition(positive, a, b):
    """The 2 x 2 covariance of two areas."""
    parts = [definition(positive, s) for s in (a, b)]
    s10 = np.cov([p[1] for p in parts])
    s01 = np.cov([p[2] for p in parts])
    return [p[0] for p in parts], s10 / positive.sum() + s01 / (~positive).sum()


def draw(n, seed, ties):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    a, b = rng.normal(size=n) + positive, rng.normal(size=n) + 0.6 * positive
    return (positive, np.round(a), np.round(2 * b) / 2) if ties else (positive, a, b)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [11, 97])
def test_test_and_interval_are_those_of_the_definition(n, ties):
    positive, a, b = draw(n, n, ties)
    (area_a, area_b), cov = covariance_by_definition(positive, a, b)
    found = delong_test(positive, a, b)
    variance = cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]
    z = (area_a - area_b) / math.sqrt(variance)
    assert found.auc_a == pytest.approx(area_a, abs=1e-12)
    assert found.auc_a == pytest.approx(roc_auc_score(positive, a), abs=1e-12)
    assert found.auc_b == pytest.approx(area_b, abs=1e-12)
    assert found.z == pytest.approx(z, rel=1e-9)
    assert found.p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=1e-9)
    half = 1.959963984540054 * math.sqrt(variance)
    assert found.difference.low == pytest.approx(area_a - area_b - half, abs=1e-12)
    assert found.difference.high == pytest.approx(area_a - area_b + half, abs=1e-12)
    one = auc_interval(positive, a)
    assert one.high - one.low == pytest.approx(min(1, area_a + 1.959964 * cov[0, 0] ** 0.5) - one.low, abs=1e-7)
    assert one.low == pytest.approx(area_a - 1.959963984540054 * cov[0, 0] ** 0.5, abs=1e-12)


def test_a_case_worked_by_hand():
    """Positives 3, 1; negatives 2, 0: areas of the four pairs 1, 1, 0, 1; components (1, 1/2) and (1/2, 1)."""
    interval = auc_interval(np.array([True, True, False, False]), np.array([3.0, 1.0, 2.0, 0.0]))
    assert interval.value == 0.75
    # each variance is 1/8, over 2 cases: 1/16 + 1/16
    assert interval.low == pytest.approx(0.75 - 1.959963984540054 * math.sqrt(1 / 8), abs=1e-12)
    assert interval.high == 1.0


def test_swapping_the_models_swaps_the_sign_and_keeps_p():
    positive, a, b = draw(60, 5, False)
    one, other = delong_test(positive, a, b), delong_test(positive, b, a)
    assert (one.z, one.p) == pytest.approx((-other.z, other.p))


def test_any_rising_map_of_the_scores_changes_nothing():
    positive, a, b = draw(60, 6, True)
    assert delong_test(positive, np.exp(a) * 3, b) == delong_test(positive, a, b)


def test_models_that_rank_alike_do_not_differ():
    positive, a, _ = draw(40, 7, False)
    found = delong_test(positive, a, 2 * a + 1)
    assert (found.difference.value, found.z, found.p) == (0.0, 0.0, 1.0)


def test_p_is_uniform_where_two_models_are_equally_good():
    """Of 400 draws of two alike but separate models a twentieth has p < 0.05, give or take."""
    rng = np.random.default_rng(0)
    small = 0
    for _ in range(400):
        positive = np.arange(80) % 2 == 0
        a, b = rng.normal(size=(2, 80)) + positive
        small += delong_test(positive, a, b).p < 0.05
    assert 8 <= small <= 34


def test_the_interval_holds_the_true_area_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth = 0.5 * (1 + math.erf(1 / 2))
    inside = 0
    for _ in range(400):
        positive = np.arange(120) % 3 == 0
        interval = auc_interval(positive, rng.normal(size=120) + positive)
        inside += interval.low <= truth <= interval.high
    assert 364 <= inside <= 394


def test_midranks_share_the_mean_of_ties():
    from scipy.stats import rankdata

    values = np.random.default_rng(0).integers(0, 9, 50).astype(float)
    np.testing.assert_array_equal(midranks(values), rankdata(values))


def test_one_kind_alone_is_not_compared():
    assert math.isnan(auc_interval(np.ones(3, bool), np.arange(3.0)).value)
    alone = auc_interval(np.array([True, False, False]), np.arange(3.0))
    assert alone.value == 0.0
    assert math.isnan(alone.low)
    with pytest.raises(InputError, match="two cases of each kind; there are 1 with and 2 without"):
        delong_test(np.array([True, False, False]), np.arange(3.0), np.arange(3.0))
    with pytest.raises(InputError, match="finite numbers"):
        auc_interval(np.array([True, False]), np.array([np.nan, 1.0]))
