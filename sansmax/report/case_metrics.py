"""How good the predictions of cases are, whatever the task, with 95 % bootstrap intervals over patients.

    metrics = measure_cases("survival", targets, risks, ("risk",), groups=patients, folds=folds)
    metrics.scores["c_index"].low

predictions `(n, outputs)` in float64: classification probabilities that sum to 1; multilabel probabilities of each
label; regression values; survival risks `(n, 1)`, larger for an earlier event. Targets as `Cases.targets`. Each
resample draws whole patients; `folds` names the network of each case.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from sansmax.errors import InputError, unknown_name
from sansmax.report.metrics import BATCH, RESAMPLES, affordable, checked, class_values, joined
from sansmax.report.metrics import TITLES as CLASS_TITLES
from sansmax.report.regression import TITLES as VALUE_TITLES
from sansmax.report.regression import regression_scores
from sansmax.report.resample import Interval, draw_weights, group_codes, percentile_interval
from sansmax.report.scores import all_scores, mean_defined, ranking
from sansmax.report.survival import concordance

TITLES = {
    **CLASS_TITLES,
    **VALUE_TITLES,
    "auc": "AUROC",
    "average_precision": "AUPRC",
    "plain_kappa": "kappa",
    "brier": "Brier score",
    "c_index": "c-index",
}
# the score that a task is judged and chosen by, and whether larger is better
PRIMARY = {"classification": ("auc", 1), "multilabel": ("auc", 1), "regression": ("r2", 1), "survival": ("c_index", 1)}
Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class CaseMetrics:
    """Scores of all cases, and of each class or target by itself; how many cases and patients are behind them."""

    task: str
    scores: Mapping[str, Interval]
    by_class: Mapping[str, Mapping[str, Interval]]
    cases: int
    patients: int
    notes: tuple[str, ...] = ()
    resamples: int = RESAMPLES
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "task": self.task,
            "cases": self.cases,
            "patients": self.patients,
            "scores": {name: v.to_dict() for name, v in self.scores.items()},
            "by_class": {c: {name: v.to_dict() for name, v in own.items()} for c, own in self.by_class.items()},
            "notes": list(self.notes),
            "resamples": self.resamples,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "CaseMetrics":
        """The inverse of `to_dict`."""
        return cls(
            plain["task"],
            {name: Interval.from_dict(v) for name, v in plain["scores"].items()},
            {c: {n: Interval.from_dict(v) for n, v in own.items()} for c, own in plain["by_class"].items()},
            plain["cases"],
            plain["patients"],
            tuple(plain["notes"]),
            plain["resamples"],
            plain["seed"],
        )


def measure_cases(
    task: str,
    targets: np.ndarray,
    predictions: np.ndarray,
    classes: Sequence[str],
    *,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    folds: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> CaseMetrics:
    """Every score of the task with its interval.

    Classification: AUROC and AUPRC (of the last of two classes; else means over the classes, each against the rest),
    accuracy, balanced accuracy, macro F1, kappa, of grades also quadratic kappa, Brier score, log loss, calibration.
    Multilabel: AUROC and AUPRC as means over labels, and per label, unknown labels left out. Regression: R2, mean
    absolute error, Pearson, Spearman. Survival: Harrell's c-index, over pairs inside one fold.
    """
    y, p = np.asarray(targets), np.asarray(predictions, np.float64)
    codes = group_codes(groups, len(y))
    draw = sampler(task, y, p, list(classes), folds)
    overall, by_class, used = resampled(draw, codes, resamples, seed, cells(task, p))
    units = int(codes.max()) + 1
    scores = {name: percentile_interval(v, units, undefined(task, name)) for name, v in overall.items()}
    own = {
        c: {name: percentile_interval(v[i], units, undefined(task, name)) for name, v in by_class.items()}
        for i, c in enumerate(classes if by_class else ())
    }
    notes = [f"{TITLES[name]}: {v.note}" for name, v in scores.items() if v.note]
    if used < resamples:
        notes.append(f"{used} instead of {resamples} resamples, for the many cases")
    return CaseMetrics(task, scores, own, len(y), units, tuple(notes), used, seed)


def compare_cases(
    task: str,
    targets: np.ndarray,
    predictions_a: np.ndarray,
    predictions_b: np.ndarray,
    classes: Sequence[str],
    *,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    folds_a: np.ndarray | None = None,
    folds_b: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """The difference "a minus b" of every score, on the same cases and the same resamples of patients."""
    y = np.asarray(targets)
    codes = group_codes(groups, len(y))
    parts = []
    for predictions, folds in ((predictions_a, folds_a), (predictions_b, folds_b)):
        p = np.asarray(predictions, np.float64)
        draw = sampler(task, y, p, list(classes), folds)
        parts.append(resampled(draw, codes, resamples, seed, cells(task, p))[0])
    units = int(codes.max()) + 1
    a, b = parts
    return {name: percentile_interval(a[name] - b[name], units, undefined(task, name)) for name in a}


def cells(task: str, predictions: np.ndarray) -> int:
    """What a resample costs: ranking goes by cases and classes, the c-index by pairs of cases."""
    return len(predictions) ** 2 // 8 if task == "survival" else predictions.size


def resampled(
    draw: Callable[[np.ndarray], tuple[Scores, Scores]], codes: np.ndarray, resamples: int, seed: int, cost: int
) -> tuple[Scores, Scores, int]:
    """Overall and class scores, last axis: the data themselves, then the resamples; and how many these are."""
    used = affordable(resamples, max(1, cost))
    batches = chain([np.ones((len(codes), 1))], draw_weights(codes, used, seed, max(1, BATCH // len(codes))))
    parts = [draw(weights) for weights in batches]
    return joined([a for a, _ in parts]), joined([b for _, b in parts]), used


def sampler(
    task: str, y: np.ndarray, p: np.ndarray, classes: list[str], folds: np.ndarray | None
) -> Callable[[np.ndarray], tuple[Scores, Scores]]:
    """The function from weights `(n, r)` to scores `(r,)` and scores of each class `(k, r)`."""
    if p.shape != (len(y), len(classes)):
        raise InputError(f"predictions must be of shape ({len(y)}, {len(classes)}), cases and outputs; given {p.shape}")
    if wrong := int((~np.isfinite(p)).any(axis=1).sum()):
        raise InputError(f"predictions must be finite numbers; {wrong} of {len(p)} rows are not")
    if task == "classification":
        y, p, names = checked(y, p, classes)
        return lambda w: class_scores(w, y, p, names)
    if task == "multilabel":
        return lambda w: label_scores(w, y, p)
    if task == "regression":
        return lambda w: value_scores(w, y, p)
    if task == "survival":
        return lambda w: ({"c_index": concordance(w, y, p[:, 0], folds)}, {})
    raise unknown_name("task", task, ("classification", "multilabel", "regression", "survival"))


def class_scores(weights: np.ndarray, y: np.ndarray, p: np.ndarray, names: list[str]) -> tuple[Scores, Scores]:
    """The scores of images, and those that slides are judged by besides."""
    overall, by_class = all_scores(weights, y, p, class_values(names, None))
    k = len(names)
    overall["plain_kappa"] = plain_kappa(weights, y, p.argmax(axis=1), k)
    # of two classes the usual form, that of the second one alone
    apart = ((p - np.eye(k)[y]) ** 2).sum(axis=1) / (2 if k == 2 else 1)
    overall["brier"] = apart @ weights / weights.sum(axis=0)
    return overall, {
        name: by_class[name] for name in ("auc", "average_precision", "recall", "specificity", "precision")
    }


def plain_kappa(weights: np.ndarray, y: np.ndarray, predicted: np.ndarray, k: int) -> np.ndarray:
    """Cohen's kappa: the agreement beyond that by chance, of all that could be."""
    total = weights.sum(axis=0)
    agreed = (y == predicted).astype(float) @ weights / total
    chance = sum(((y == c) @ weights) * ((predicted == c) @ weights) for c in range(k)) / total**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance >= 1 - 1e-12, np.nan, (agreed - chance) / (1 - chance))


def label_scores(weights: np.ndarray, y: np.ndarray, p: np.ndarray) -> tuple[Scores, Scores]:
    """Ranking and Brier scores of each label over the cases where it is known, and their means over the labels."""
    own: dict[str, list[np.ndarray]] = {"auc": [], "average_precision": [], "brier": []}
    for truth, score in zip(y.T, p.T, strict=True):
        known = np.isfinite(truth)
        w, t, s = weights[known], truth[known], score[known]
        area, precision = ranking(w, s, t == 1) if known.any() else (np.full(weights.shape[1], np.nan),) * 2
        own["auc"].append(area)
        own["average_precision"].append(precision)
        total = w.sum(axis=0)
        own["brier"].append(np.where(total > 0, (t - s) ** 2 @ w / np.maximum(total, 1e-300), np.nan))
    by_class = {name: np.stack(rows) for name, rows in own.items()}
    return {name: mean_defined(rows) for name, rows in by_class.items()}, by_class


def value_scores(weights: np.ndarray, y: np.ndarray, p: np.ndarray) -> tuple[Scores, Scores]:
    """Scores of each measurement over the cases where it is known, and their means over the measurements."""
    parts = []
    for truth, predicted in zip(y.T, p.T, strict=True):
        known = np.isfinite(truth)
        parts.append(regression_scores(weights[known], truth[known], predicted[known]))
    by_class = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: mean_defined(rows) for name, rows in by_class.items()}, by_class


def undefined(task: str, name: str) -> str:
    """Why a score may have no value."""
    if task == "survival":
        return "no two cases can be compared: there are too few events"
    if name in ("auc", "average_precision"):
        return "needs cases with and without the class"
    return "kappa: all are one class" if "kappa" in name else "not defined: the values do not vary"
