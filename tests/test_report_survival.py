"""The c-index, Kaplan-Meier and log-rank against lifelines, the definition and hand-computed cases."""

import math

import numpy as np
import pytest

from sansmax.report.case_metrics import measure_cases
from sansmax.report.survival import concordance, kaplan_meier, log_rank, risk_groups


def draw(n, seed=0, ties=False):
    """Targets and risks that know something of them; with `ties` times and risks are whole numbers."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    time, censored = rng.exponential(np.exp(-risk)), rng.exponential(1.5, n)
    y = np.stack([np.minimum(time, censored) * 10, time <= censored], axis=1).astype(float)
    if ties:
        y[:, 0], risk = np.ceil(y[:, 0] / 3), np.round(risk)
    return y, risk + 0.5 * (0 if ties else rng.normal(size=n))


def by_definition(y, risk, codes=None):
    """Harrell's c-index, pair by pair."""
    right = pairs = 0.0
    for i in range(len(y)):
        for j in range(len(y)):
            if codes is not None and codes[i] != codes[j]:
                continue
            first = y[i, 1] and (y[i, 0] < y[j, 0] or (y[i, 0] == y[j, 0] and not y[j, 1]))
            if first:
                pairs += 1
                right += 1 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0
    return right / pairs if pairs else math.nan


def one(y, risk, codes=None):
    return float(concordance(np.ones((len(y), 1)), y, risk, codes)[0])


@pytest.mark.parametrize("ties", [False, True])
def test_the_c_index_is_that_of_lifelines_and_of_the_definition(ties):
    utils = pytest.importorskip("lifelines.utils")
    y, risk = draw(130, seed=3, ties=ties)
    expected = utils.concordance_index(y[:, 0], -risk, y[:, 1])
    assert one(y, risk) == pytest.approx(expected, abs=1e-12)
    assert one(y, risk) == pytest.approx(by_definition(y, risk), abs=1e-12)


def test_the_c_index_of_more_cases_than_a_block_is_the_same():
    y, risk = draw(700, seed=4, ties=True)
    utils = pytest.importorskip("lifelines.utils")
    assert one(y, risk) == pytest.approx(utils.concordance_index(y[:, 0], -risk, y[:, 1]), abs=1e-12)


def test_weights_are_repeated_cases():
    y, risk = draw(40, seed=5, ties=True)
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 4, (40, 6)).astype(float)
    found = concordance(weights, y, risk)
    for column, value in zip(weights.T, found, strict=True):
        rows = np.repeat(np.arange(40), column.astype(int))
        assert value == pytest.approx(by_definition(y[rows], risk[rows]), abs=1e-12)


def test_cases_of_two_folds_are_not_compared():
    y, risk = draw(60, seed=6)
    codes = np.arange(60) % 3
    assert one(y, risk + 100 * codes, codes) == pytest.approx(by_definition(y, risk, codes), abs=1e-12)
    assert one(y, risk + 100 * codes, codes) == one(y, risk, codes)


def test_perfect_reversed_and_constant_risks():
    y = np.array([[1.0, 1], [2, 1], [3, 0], [4, 1], [5, 0]])
    assert one(y, -y[:, 0]) == 1
    assert one(y, y[:, 0]) == 0
    assert one(y, np.zeros(5)) == 0.5
    assert math.isnan(one(np.array([[1.0, 0], [2.0, 0]]), np.arange(2.0)))


@pytest.mark.parametrize("ties", [False, True])
def test_kaplan_meier_and_its_band_are_those_of_lifelines(ties):
    lifelines = pytest.importorskip("lifelines")
    y, _ = draw(90, seed=7, ties=ties)
    fit = lifelines.KaplanMeierFitter().fit(y[:, 0], y[:, 1])
    km = kaplan_meier(y)
    np.testing.assert_allclose(km.survival, fit.survival_function_at_times(km.times), atol=1e-12)
    band = fit.confidence_interval_.to_numpy()
    np.testing.assert_allclose(km.low, band[:, 0], atol=1e-9)
    np.testing.assert_allclose(km.high, band[:, 1], atol=1e-9)
    assert km.median() == fit.median_survival_time_
    assert km.at_risk[1] == 90


def test_a_survival_curve_by_hand():
    """Five patients, events at 1 and 3, one leaves at 2: 4/5, then 4/5 * 2/3."""
    km = kaplan_meier(np.array([[1.0, 1], [2, 0], [3, 1], [4, 0], [5, 0]]))
    np.testing.assert_allclose(km.survival, [1, 0.8, 0.8, 0.8 * 2 / 3, 0.8 * 2 / 3, 0.8 * 2 / 3])
    assert km.at_risk.tolist() == [5, 5, 4, 3, 2, 1]
    assert km.median() == math.inf


# its calls of pandas are out of date
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_log_rank_is_that_of_lifelines(groups, ties):
    statistics = pytest.importorskip("lifelines.statistics")
    y, risk = draw(110, seed=8, ties=ties)
    which = risk_groups(risk + 0.7 * np.random.default_rng(1).normal(size=110), groups=groups)
    expected = statistics.multivariate_logrank_test(y[:, 0], which, y[:, 1])
    statistic, p = log_rank(y, which)
    assert statistic == pytest.approx(expected.test_statistic, rel=1e-9)
    assert p == pytest.approx(expected.p_value, rel=1e-6)


def test_log_rank_of_strata_compares_inside_them_only():
    """A group that merely lives in the stratum of the short-lived does not differ from the other."""
    rng = np.random.default_rng(2)
    codes = np.repeat([0, 1], 200)
    groups = (rng.random(400) < np.where(codes, 0.8, 0.2)).astype(int)
    y = np.stack([rng.exponential(np.where(codes, 1.0, 9.0)), np.ones(400)], axis=1)
    assert log_rank(y, groups)[1] < 1e-4
    assert log_rank(y, groups, codes)[1] > 0.05


def test_log_rank_that_cannot_be_told_is_nan():
    y = np.array([[1.0, 0], [2.0, 0]])
    assert math.isnan(log_rank(y, np.array([0, 1]))[1])
    assert math.isnan(log_rank(np.array([[1.0, 1], [2.0, 1]]), np.zeros(2))[1])


def test_risk_groups_are_halves_of_each_fold():
    risk = np.array([1.0, 2, 3, 4, 101, 102, 103, 104])
    codes = np.repeat([0, 1], 4)
    assert risk_groups(risk, codes).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert risk_groups(risk).tolist() == [0] * 4 + [1] * 4
    assert risk_groups(np.arange(9.0), groups=3).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_interval_of_the_c_index_is_that_of_a_loop_over_the_resamples():
    from sansmax.report.resample import draw_weights, group_codes

    y, risk = draw(30, seed=9)
    patients = [f"p{i // 2}" for i in range(30)]
    found = measure_cases("survival", y, risk[:, None], ("risk",), groups=patients, resamples=60, seed=4)
    weights = np.concatenate(list(draw_weights(group_codes(patients, 30), 60, 4, 2**18 // 30)), axis=1)
    values = []
    for column in weights.T:
        rows = np.repeat(np.arange(30), column.astype(int))
        values.append(by_definition(y[rows], risk[rows]))
    c = found.scores["c_index"]
    assert c.value == pytest.approx(by_definition(y, risk), abs=1e-12)
    assert (c.low, c.high) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))), abs=1e-12)
    assert found.patients == 15
