"""Scores of cases of every task: values by scikit-learn, intervals by a loop over resampled patients."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from sansmax.errors import InputError
from sansmax.report.case_metrics import CaseMetrics, compare_cases, measure_cases
from sansmax.report.case_predictions import CasePredictions, read_case_predictions, write_case_predictions
from sansmax.report.fold_curves import fold_figure
from sansmax.report.resample import draw_weights, group_codes


def classification(n, k, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    e = np.exp(rng.normal(size=(n, k)) + 1.5 * np.eye(k)[y])
    return y, e / e.sum(1, keepdims=True)


def multilabel(n, seed=0):
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 3)) < [0.2, 0.5, 0.7]).astype(float)
    p = 1 / (1 + np.exp(-(2 * y - 1 + rng.normal(size=y.shape))))
    y[rng.random(y.shape) < 0.15] = np.nan
    return y, p


@pytest.mark.parametrize("k", [2, 3])
def test_classes_have_kappa_and_brier_by_scikit_learn(k):
    y, p = classification(90, k)
    found = measure_cases("classification", y, p, [f"c{i}" for i in range(k)], resamples=20)
    assert found.scores["plain_kappa"].value == pytest.approx(sk.cohen_kappa_score(y, p.argmax(1)), abs=1e-12)
    brier = sk.brier_score_loss(y, p[:, 1]) if k == 2 else ((p - np.eye(3)[y]) ** 2).sum(1).mean()
    assert found.scores["brier"].value == pytest.approx(brier, abs=1e-12)
    auc = sk.roc_auc_score(y, p[:, 1]) if k == 2 else sk.roc_auc_score(y, p, multi_class="ovr")
    assert found.scores["auc"].value == pytest.approx(auc, abs=1e-12)
    assert found.scores["balanced_accuracy"].value == pytest.approx(sk.balanced_accuracy_score(y, p.argmax(1)))
    assert "kappa" not in found.scores
    assert found.by_class["c1"]["auc"].value == pytest.approx(sk.roc_auc_score(y == 1, p[:, 1]), abs=1e-12)


def test_grades_have_quadratic_kappa_too():
    y, p = classification(90, 3)
    found = measure_cases("classification", y, p, ["0", "1", "2"], resamples=20)
    expected = sk.cohen_kappa_score(y, p.argmax(1), weights="quadratic")
    assert found.scores["kappa"].value == pytest.approx(expected, abs=1e-12)


def test_unknown_labels_count_nowhere():
    y, p = multilabel(120)
    found = measure_cases("multilabel", y, p, ["a", "b", "c"], resamples=20)
    areas = []
    for i, name in enumerate("abc"):
        known = np.isfinite(y[:, i])
        areas.append(sk.roc_auc_score(y[known, i], p[known, i]))
        own = found.by_class[name]
        assert own["auc"].value == pytest.approx(areas[-1], abs=1e-12)
        precision = sk.average_precision_score(y[known, i], p[known, i])
        assert own["average_precision"].value == pytest.approx(precision, abs=1e-12)
        assert own["brier"].value == pytest.approx(np.mean((y[known, i] - p[known, i]) ** 2))
    assert found.scores["auc"].value == pytest.approx(np.mean(areas), abs=1e-12)


def test_intervals_are_percentiles_over_resampled_patients():
    y, p = multilabel(40)
    patients = [f"p{i // 2}" for i in range(40)]
    found = measure_cases("multilabel", y, p, ["a", "b", "c"], groups=patients, resamples=50, seed=3)
    weights = next(draw_weights(group_codes(patients, 40), 50, 3, 50))
    values = []
    for column in weights.T:
        rows = np.repeat(np.arange(40), column.astype(int))
        rows = rows[np.isfinite(y[rows, 1])]
        values.append(sk.roc_auc_score(y[rows, 1], p[rows, 1]))
    own = found.by_class["b"]["auc"]
    assert (own.low, own.high) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))), abs=1e-12)
    assert (found.cases, found.patients) == (40, 20)


def test_a_model_against_itself_does_not_differ_and_a_better_one_does():
    y, p = classification(200, 2)
    worse = np.random.default_rng(5).permutation(p)
    same = compare_cases("classification", y, p, p, ("a", "b"), resamples=100)
    assert all(d.value == d.low == d.high == 0 for d in same.values())
    better = compare_cases("classification", y, p, worse, ("a", "b"), resamples=100)
    assert better["auc"].low > 0
    assert better["auc"].value == pytest.approx(sk.roc_auc_score(y, p[:, 1]) - sk.roc_auc_score(y, worse[:, 1]))


def test_metrics_survive_json():
    y, p = multilabel(30)
    y[:, 2] = np.nan
    found = measure_cases("multilabel", y, p, ["a", "b", "c"], resamples=20)
    text = json.dumps(found.to_dict(), allow_nan=False)
    again = CaseMetrics.from_dict(json.loads(text))
    assert again.to_dict() == found.to_dict()
    assert math.isnan(again.by_class["c"]["auc"].value)
    assert "with and without the class" in again.by_class["c"]["auc"].note


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (np.zeros((3, 1)), r"of shape \(3, 2\), cases and outputs; given \(3, 1\)"),
        (np.array([[0, 1], [np.nan, 0], [0.5, 0.5]]), "1 of 3 rows are not"),
        (np.array([[0, 1], [3.0, -1], [0.5, 0.5]]), "apply a softmax"),
    ],
)
def test_predictions_that_do_not_fit_are_explained(predictions, message):
    with pytest.raises(InputError, match=message):
        measure_cases("classification", np.array([0, 1, 0]), predictions, ("a", "b"))
    with pytest.raises(InputError, match="unknown task 'ranking'"):
        measure_cases("ranking", np.zeros(3), np.zeros((3, 1)), ("a",))


# The table


def predictions(task):
    n = 8
    ids, folds = tuple(f"00{i}" for i in range(n)), np.arange(n) // 4
    rng = np.random.default_rng(0)
    if task == "classification":
        y, p = classification(n, 3)
        return CasePredictions(task, ("grade",), ("low", "mid", "high"), ids, y, p, folds)
    if task == "multilabel":
        y, p = multilabel(n)
        y[0, 0] = np.nan
        return CasePredictions(task, ("a", "b", "c"), ("a", "b", "c"), ids, y, p, folds)
    if task == "regression":
        return CasePredictions(task, ("age",), ("age",), ids, rng.normal(size=(n, 1)), rng.normal(size=(n, 1)), folds)
    if task == "two values":
        y = rng.normal(size=(n, 2))
        y[2, 1] = np.nan
        return CasePredictions("regression", ("age", "bmi"), ("age", "bmi"), ids, y, rng.normal(size=(n, 2)), folds)
    y = np.stack([rng.exponential(size=n), rng.integers(0, 2, n)], axis=1).astype(float)
    return CasePredictions("survival", ("months", "dead"), ("risk",), ids, y, rng.normal(size=(n, 1)), folds)


@pytest.mark.parametrize("by_slide", [False, True])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "two values", "survival"])
def test_a_table_of_predictions_reads_back_to_the_last_digit(tmp_path, task, by_slide):
    from dataclasses import replace

    preds = predictions(task)
    if by_slide:
        preds = replace(preds, patients=tuple(f"q{i // 2}" for i in range(8)))
    write_case_predictions(tmp_path / "p.csv", preds)
    again = read_case_predictions(tmp_path / "p.csv", preds.task, preds.target, preds.classes)
    assert (again.ids, again.patients, again.groups) == (preds.ids, preds.patients, preds.groups)
    for name in ("targets", "predictions", "folds"):
        np.testing.assert_array_equal(getattr(again, name), getattr(preds, name))
        assert getattr(again, name).dtype == getattr(preds, name).dtype


def test_the_columns_are_those_of_stamp(tmp_path):
    preds = predictions("classification")
    lines = write_case_predictions(tmp_path / "p.csv", preds).read_text().splitlines()
    assert lines[0] == "PATIENT,grade,pred,grade_low,grade_mid,grade_high,loss,fold"
    first = lines[1].split(",")
    assert first[:3] == ["000", preds.classes[preds.targets[0]], preds.classes[preds.predictions[0].argmax()]]
    assert float(first[6]) == pytest.approx(-np.log(preds.predictions[0, preds.targets[0]]))


def test_a_table_of_another_target_is_refused(tmp_path):
    path = write_case_predictions(tmp_path / "p.csv", predictions("classification"))
    with pytest.raises(InputError, match="no table of predictions for classification of stage"):
        read_case_predictions(path, "classification", ("stage",), ("a", "b"))
    with pytest.raises(InputError, match="--resume"):
        read_case_predictions(tmp_path / "none.csv", "classification", ("stage",), ("a", "b"))


# The picture


def test_the_curves_of_folds_and_of_all_are_those_of_scikit_learn():
    y, p = classification(60, 2)
    folds = np.arange(60) % 3
    left, right = fold_figure(y == 1, p[:, 1], folds, "b").axes
    thick = {name: next(line for line in axes.lines if line.get_linewidth() == 2.2) for name, axes in
             (("roc", left), ("pr", right))}  # fmt: skip
    fpr, tpr, _ = sk.roc_curve(y, p[:, 1], drop_intermediate=False)
    np.testing.assert_allclose(thick["roc"].get_xdata(), fpr)
    np.testing.assert_allclose(thick["roc"].get_ydata(), tpr)
    precision, recall, _ = sk.precision_recall_curve(y, p[:, 1])
    # from the strictest threshold on, without the point that scikit-learn adds at recall 0
    np.testing.assert_allclose(thick["pr"].get_xdata()[1:], recall[::-1][1:])
    np.testing.assert_allclose(thick["pr"].get_ydata()[1:], precision[::-1][1:])
    thin = [line for line in left.lines if line.get_linewidth() == 0.9]
    assert len(thin) == 3
    fpr, tpr, _ = sk.roc_curve(y[folds == 1], p[folds == 1, 1], drop_intermediate=False)
    np.testing.assert_allclose(thin[1].get_ydata(), tpr)


def test_a_class_without_cases_is_drawn_without_a_curve():
    left, _ = fold_figure(np.zeros(10, bool), np.arange(10.0), np.zeros(10, int), "never").axes
    assert [line for line in left.lines if line.get_linewidth() == 2.2] == []
