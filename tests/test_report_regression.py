"""Scores of measurements against scipy and scikit-learn, and weights against repeated cases."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from sansmax.report.regression import regression_scores, scatter, weighted_ranks


def draw(n, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    truth = 50 + 10 * rng.normal(size=n)
    predicted = 0.7 * truth + 6 * rng.normal(size=n) + 12
    return (np.round(truth, -1), np.round(predicted, -1)) if ties else (truth, predicted)


def by_libraries(truth, predicted):
    return {
        "r2": sk.r2_score(truth, predicted),
        "mae": sk.mean_absolute_error(truth, predicted),
        "pearson": stats.pearsonr(truth, predicted).statistic,
        "spearman": stats.spearmanr(truth, predicted).statistic,
    }


@pytest.mark.parametrize("ties", [False, True])
def test_scores_are_those_of_scipy_and_scikit_learn(ties):
    truth, predicted = draw(83, ties=ties)
    found = regression_scores(np.ones((83, 1)), truth, predicted)
    for name, value in by_libraries(truth, predicted).items():
        assert found[name][0] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("ties", [False, True])
def test_weights_are_repeated_cases(ties):
    truth, predicted = draw(40, seed=1, ties=ties)
    weights = np.random.default_rng(2).integers(0, 4, (40, 5)).astype(float)
    found = regression_scores(weights, truth, predicted)
    for j, column in enumerate(weights.T):
        rows = np.repeat(np.arange(40), column.astype(int))
        for name, value in by_libraries(truth[rows], predicted[rows]).items():
            assert found[name][j] == pytest.approx(value, abs=1e-10), name


def test_ranks_under_weights_are_those_of_the_repeated_values():
    values = np.array([3.0, 1.0, 3.0, 2.0])
    weights = np.array([[2.0], [1.0], [0.0], [3.0]])
    repeated = stats.rankdata([3, 3, 1, 2, 2, 2])
    assert weighted_ranks(weights, values)[[0, 1, 3], 0].tolist() == [repeated[0], repeated[2], repeated[3]]


@pytest.mark.parametrize("size", [0.1, 1e8])
def test_what_does_not_vary_has_no_correlation(size):
    truth, predicted = draw(20)
    flat = np.full(20, size)
    found = regression_scores(np.ones((20, 2)), truth, flat)
    assert np.isnan(found["pearson"]).all()
    assert np.isnan(found["spearman"]).all()
    assert np.isfinite(found["r2"]).all()
    found = regression_scores(np.ones((20, 2)), flat, predicted)
    assert np.isnan(found["r2"]).all()


def test_one_case_has_an_error_and_nothing_else():
    found = regression_scores(np.ones((1, 1)), np.array([2.0]), np.array([5.0]))
    assert found["mae"][0] == 3
    assert all(math.isnan(found[name][0]) for name in ("r2", "pearson", "spearman"))


def test_the_dots_of_the_picture_are_the_cases(tmp_path):
    from sansmax.report.regression import scatter_figure

    truth, predicted = draw(30)
    truth[3] = np.nan
    folds = np.arange(30) % 3
    figure = scatter_figure(truth, predicted, "age", folds=folds)
    axes = figure.axes[0]
    dots = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert [len(line.get_xdata()) for line in dots] == [9, 10, 10]
    np.testing.assert_array_equal(dots[1].get_ydata(), predicted[folds == 1])
    assert axes.get_xlim() == axes.get_ylim()
    assert scatter(truth, predicted, "age", tmp_path / "s.png").stat().st_size > 5000
