"""Metrics against scikit-learn, hand-computed cases, and a slow loop over the same resamples."""

import json
import time

import numpy as np
import pytest
from sklearn import metrics as sk

from sansmax.errors import InputError
from sansmax.report.metrics import Metrics, compare_paired, measure
from sansmax.report.resample import draw_weights, group_codes, percentile_interval
from sansmax.report.scores import all_scores, calibration_error


def draw(n, k, seed=0, ties=False, sharp=2.0):
    """Labels and fairly good probabilities in float64; with `ties` many are equal."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k)) + sharp * np.eye(k)[labels]
    if ties:
        logits = np.round(logits)
    e = np.exp(logits)
    return labels, e / e.sum(1, keepdims=True)


def names(k):
    return [str(i) for i in range(k)]


def by_sklearn(y, p):
    """Every overall score by scikit-learn, classes that are absent left out; NaN where there is one class."""
    k, predicted = p.shape[1], p.argmax(1)
    present = np.unique(y)
    one_kind = len(present) == 1
    columns = [k - 1] if k == 2 else present
    nan = float("nan")
    labels = list(range(k))
    union = np.union1d(y, predicted)
    return {
        "auc": nan if one_kind else np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in columns]),
        "average_precision": nan
        if one_kind
        else np.mean([sk.average_precision_score(y == c, p[:, c]) for c in columns]),
        "accuracy": sk.accuracy_score(y, predicted),
        "balanced_accuracy": np.mean([(predicted[y == c] == c).mean() for c in present]),
        "macro_f1": sk.f1_score(y, predicted, average="macro", labels=union, zero_division=0),
        "kappa": nan if len(union) == 1 else sk.cohen_kappa_score(y, predicted, weights="quadratic", labels=labels),
        "log_loss": sk.log_loss(y, p, labels=labels),
    }


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [2, 3, 7])
def test_values_are_those_of_scikit_learn(k, ties):
    y, p = draw(211, k, seed=k, ties=ties)
    ours = measure(y, p, names(k), resamples=10)
    for name, value in by_sklearn(y, p).items():
        assert ours[name].value == pytest.approx(value, abs=1e-12), name
    assert ours["balanced_accuracy"].value == pytest.approx(sk.balanced_accuracy_score(y, p.argmax(1)), abs=1e-12)
    if k == 2:
        assert ours["auc"].value == pytest.approx(sk.roc_auc_score(y, p[:, 1]), abs=1e-12)
    else:
        assert ours["auc"].value == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr"), abs=1e-12)


def test_class_scores_are_those_of_scikit_learn():
    y, p = draw(157, 4, seed=9, sharp=1.0)
    table = measure(y, p, names(4), resamples=10).classes
    precision, recall, f1, support = sk.precision_recall_fscore_support(y, p.argmax(1))
    for c, row in enumerate(table):
        assert row.precision.value == pytest.approx(precision[c], abs=1e-12)
        assert row.recall.value == pytest.approx(recall[c], abs=1e-12)
        assert row.f1.value == pytest.approx(f1[c], abs=1e-12)
        assert row.images == support[c]
        assert row.predicted == (p.argmax(1) == c).sum()
        negative = y != c
        assert row.specificity.value == pytest.approx((p.argmax(1)[negative] != c).mean(), abs=1e-12)


def test_a_case_computed_by_hand():
    y = np.array([0, 0, 1, 1])
    positive = np.array([0.1, 0.6, 0.4, 0.9])
    m = measure(y, np.stack([1 - positive, positive], 1), ["benign", "malignant"], resamples=50)
    # pairs: .4 > .1, .4 < .6, .9 > both: three of four
    assert m["auc"].value == pytest.approx(0.75)
    # found at ranks 1 and 3 of .9 .6 .4 .1
    assert m["average_precision"].value == pytest.approx((1 + 2 / 3) / 2)
    assert m["accuracy"].value == 0.5
    assert m["log_loss"].value == pytest.approx(-np.log([0.9, 0.4, 0.4, 0.9]).mean())
    # confidences .9 .6 .6 .9, right wrong wrong right: bins hold (.9, 1) twice and (.6, 0) twice
    assert m["calibration_error"].value == pytest.approx(0.5 * 0.1 + 0.5 * 0.6)
    assert "kappa" not in m


def test_calibration_bins_are_closed_above():
    p = np.array([[0.6, 0.4], [0.6000001, 0.3999999]])
    y = np.array([0, 1])
    error = calibration_error(np.ones((2, 1)), y, p)[0]
    assert error == pytest.approx((0.4 + 0.6) / 2, abs=1e-6)


def test_kappa_reads_the_numbers_of_the_grades():
    y, p = draw(80, 3, seed=4, sharp=1.0)
    even = measure(y, p, ["0", "1", "2"], resamples=5)["kappa"].value
    assert measure(y, p, ["10", "20", "30"], resamples=5)["kappa"].value == pytest.approx(even, abs=1e-12)
    assert measure(y, p, ["0", "1", "9"], resamples=5)["kappa"].value != pytest.approx(even, abs=1e-3)
    assert measure(y, p, ["low", "mid", "high"], resamples=5, ordered=True)["kappa"].value == pytest.approx(even)
    assert "kappa" not in measure(y, p, ["0", "1", "2"], resamples=5, ordered=False)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("k", [2, 5])
def test_bootstrap_is_the_slow_loop_over_the_same_resamples(k, grouped):
    y, p = draw(31, k, seed=k + 20, ties=True)
    groups = [f"patient {i % 11}" for i in range(31)] if grouped else None
    resamples, seed = 60, 3
    codes = group_codes(groups, 31)
    ours = measure(y, p, names(k), groups, resamples=resamples, seed=seed)
    slow = []
    for weights in draw_weights(codes, resamples, seed, batch=1000):
        for column in weights.T.astype(int):
            rows = np.repeat(np.arange(31), column)
            slow.append(by_sklearn(y[rows], p[rows]))
    assert len(slow) == resamples
    assert ours.patients == (11 if grouped else None)
    for name in slow[0]:
        values = np.array([s[name] for s in slow])
        low, high = np.percentile(values[np.isfinite(values)], (2.5, 97.5))
        assert ours[name].low == pytest.approx(low, abs=1e-12), name
        assert ours[name].high == pytest.approx(high, abs=1e-12), name


def test_every_weighting_equals_the_repeated_images():
    y, p = draw(40, 3, seed=1, ties=True)
    weights = np.random.default_rng(0).integers(0, 4, size=(40, 6)).astype(float)
    overall, by_class = all_scores(weights, y, p, np.arange(3))
    for j, column in enumerate(weights.T.astype(int)):
        rows = np.repeat(np.arange(40), column)
        once, once_by_class = all_scores(np.ones((len(rows), 1)), y[rows], p[rows], np.arange(3))
        for name in overall:
            assert overall[name][j] == pytest.approx(once[name][0], abs=1e-12), name
        for name in by_class:
            np.testing.assert_allclose(by_class[name][:, j], once_by_class[name][:, 0], atol=1e-12)


def test_resamples_do_not_depend_on_the_batch():
    codes = group_codes([1, 1, 2, 3, 3, 3], 6)
    whole = np.concatenate(list(draw_weights(codes, 50, seed=7, batch=50)), axis=1)
    parts = np.concatenate(list(draw_weights(codes, 50, seed=7, batch=7)), axis=1)
    np.testing.assert_array_equal(whole, parts)
    assert whole.shape == (6, 50)


def test_images_of_one_patient_are_drawn_together():
    codes = group_codes(["a", "a", "b", "c", "c", "c"], 6)
    weights = next(draw_weights(codes, 100, seed=0, batch=100))
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(weights[3], weights[5])
    assert set(weights[[0, 2, 3]].sum(axis=0)) == {3.0}


def test_duplicated_images_in_groups_give_the_interval_of_single_images():
    y, p = draw(60, 3, seed=5)
    once = measure(y, p, names(3), resamples=200)
    twice = measure(np.repeat(y, 2), np.repeat(p, 2, axis=0), names(3), np.repeat(np.arange(60), 2), resamples=200)
    blind = measure(np.repeat(y, 2), np.repeat(p, 2, axis=0), names(3), resamples=200)["log_loss"]
    for name, interval in once.items():
        assert twice[name].low == pytest.approx(interval.low, abs=1e-12), name
        assert twice[name].high == pytest.approx(interval.high, abs=1e-12), name
    # who ignores the patients believes to know more than the data say
    assert blind.high - blind.low < 0.85 * (once["log_loss"].high - once["log_loss"].low)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth, trials, held = 0.8, 200, 0
    for trial in range(trials):
        right = rng.random(100) < truth
        predicted = np.where(right, 0, 1)
        p = np.where(np.eye(2)[predicted] == 1, 0.9, 0.1)
        y = np.zeros(100, int)
        interval = measure(y, p, ["a", "b"], resamples=200, seed=trial)["accuracy"]
        held += interval.low <= truth <= interval.high
    assert 0.88 <= held / trials <= 0.99


def test_the_paired_difference_is_the_difference_on_the_same_resamples():
    y, a = draw(50, 3, seed=2)
    _, b = draw(50, 3, seed=2, sharp=1.0)
    difference = compare_paired(y, a, b, names(3), resamples=100, seed=4)
    weights = next(draw_weights(np.arange(50), 100, seed=4, batch=100))
    draws = all_scores(weights, y, a, None)[0]["auc"] - all_scores(weights, y, b, None)[0]["auc"]
    low, high = np.percentile(draws, (2.5, 97.5))
    expected = sk.roc_auc_score(y, a, multi_class="ovr") - sk.roc_auc_score(y, b, multi_class="ovr")
    assert difference["auc"].value == pytest.approx(expected, abs=1e-12)
    assert (difference["auc"].low, difference["auc"].high) == pytest.approx((low, high), abs=1e-12)
    same = compare_paired(y, a, a, names(3), resamples=20)
    assert all(i.value == i.low == i.high == 0 for i in same.values())


def test_one_class_in_the_labels_gives_nan_and_the_reason():
    p = np.full((5, 2), 0.5)
    m = measure(np.zeros(5, int), p, ["healthy", "ill"], resamples=20)
    assert np.isnan(m["auc"].value)
    assert "all 5 labels are 'healthy'" in m["auc"].note
    assert m["accuracy"].value == 1
    assert any("'ill'" in note for note in m.notes)
    assert np.isnan(m.classes[1].recall.value)
    assert m.classes[1].recall.note == "no image has this class"


def test_an_absent_class_is_left_out_of_the_means_and_named():
    y, p = draw(90, 4, seed=8)
    y = np.where(y == 2, 1, y)
    m = measure(y, p, ["a", "b", "never", "d"], resamples=20)
    assert m["auc"].value == pytest.approx(np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in (0, 1, 3)]), abs=1e-12)
    assert any("'never'" in note for note in m.notes)


def test_one_image_has_values_and_no_interval():
    m = measure([1], np.array([[0.2, 0.8]]), ["a", "b"], resamples=20)
    assert m["accuracy"].value == 1
    assert np.isnan(m["accuracy"].low)
    assert "single image" in m["accuracy"].note
    assert np.isnan(m["auc"].value)


def test_a_perfect_score_comes_with_the_rule_of_three():
    y = np.arange(30) % 2
    m = measure(y, np.eye(2)[y], ["a", "b"], resamples=20)
    assert any("10.0%" in note for note in m.notes)


def test_resamples_without_a_value_are_counted():
    samples = np.array([0.5, 0.1, 0.2, np.nan, 0.3])
    interval = percentile_interval(samples, units=10)
    assert "25.0%" in interval.note
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile([0.1, 0.2, 0.3], (2.5, 97.5))))
    assert np.isnan(percentile_interval(np.array([0.5, np.nan, np.nan, 0.1]), units=10).low)


def test_metrics_survive_json():
    y, p = draw(30, 3, seed=3)
    m = measure(np.where(y == 1, 0, y), p, names(3), [i // 2 for i in range(30)], resamples=20)
    again = Metrics.from_dict(json.loads(m.to_json()))
    assert again.to_dict() == m.to_dict()
    assert "NaN" not in m.to_json()
    assert again.patients == 15


def test_many_images_and_classes_are_quick():
    y, p = draw(1000, 10)
    start = time.process_time()
    measure(y, p, names(10))
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("labels", "probabilities", "groups", "message"),
    [
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], None, "from 0 to 1"),
        ([0, 1], [[0.5, 0.5], [2.0, -3.0]], None, "apply a softmax"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], None, "1 of 2 rows"),
        ([0], [[0.5, 0.5], [0.5, 0.5]], None, "one integer per image"),
        ([0.5, 1.0], [[0.5, 0.5], [0.5, 0.5]], None, "integers"),
        ([0, 1], [[0.5, 0.3, 0.2]] * 2, None, "2 >= 2 classes"),
        ([0, 1], [[0.5, 0.5]] * 2, ["a"], "2 are needed, 1"),
        ([0, 1], [[0.5, 0.5]] * 2, ["a", None], "of 1 of 2 images is empty"),
    ],
)
def test_input_that_does_not_fit_is_explained(labels, probabilities, groups, message):
    with pytest.raises(InputError, match=message):
        measure(np.array(labels), np.array(probabilities), ["a", "b"], groups)
