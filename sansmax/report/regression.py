"""Scores of predicted measurements under many weightings of the cases at once, and the picture of both.

`weights` is `(n, r)`: how often case i counts in weighting j. Each score gives `(r,)`, exactly what it would be on the
repeated cases; NaN where it is not defined.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sansmax.report.resample import Interval
from sansmax.report.scores import divide
from sansmax.report.style import COLOURS, MUTED, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"r2": "R2", "mae": "mean absolute error", "pearson": "Pearson r", "spearman": "Spearman rho"}


def regression_scores(weights: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """R2, mean absolute error, Pearson's and Spearman's correlation of `predicted` `(n,)` with `truth` `(n,)`."""
    total = weights.sum(axis=0)
    errors = predicted - truth
    around, flat = centred(weights, truth[:, None])
    spread = np.where(flat, 0, (weights * around**2).sum(axis=0))
    return {
        "r2": 1 - divide(errors**2 @ weights, spread),
        "mae": divide(np.abs(errors) @ weights, total),
        "pearson": correlation(weights, truth[:, None], predicted[:, None]),
        "spearman": correlation(weights, weighted_ranks(weights, truth), weighted_ranks(weights, predicted)),
    }


def correlation(weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of two columns (or one per weighting); NaN where one does not vary."""
    (a, flat_a), (b, flat_b) = centred(weights, a), centred(weights, b)
    both = (weights * a * b).sum(axis=0)
    size = np.sqrt((weights * a * a).sum(axis=0) * (weights * b * b).sum(axis=0))
    return np.where(flat_a | flat_b, np.nan, np.clip(divide(both, size), -1, 1))


def centred(weights: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values less their weighted means, and where they do not vary: what rounding leaves of that is nothing."""
    values = values - values.mean(axis=0)
    before = (weights * values**2).sum(axis=0)
    values = values - divide((weights * values).sum(axis=0), weights.sum(axis=0))
    return values, (weights * values**2).sum(axis=0) <= 1e-20 * before


def weighted_ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The midrank that each case has once every case is repeated by its weight, `(n, r)`."""
    _, which = np.unique(values, return_inverse=True)
    sums = np.zeros((int(which.max()) + 1, weights.shape[1]))
    np.add.at(sums, which, weights)
    return (np.cumsum(sums, axis=0) - (sums - 1) / 2)[which]


def scatter(
    truth: np.ndarray,
    predicted: np.ndarray,
    name: str,
    path: str | Path,
    *,
    scores: dict[str, Interval] | None = None,
    folds: np.ndarray | None = None,
) -> Path:
    """Predicted against true values of one target, a dot per case, coloured by the fold that tested it."""
    with look():
        return save(scatter_figure(truth, predicted, name, scores, folds), path)


def scatter_figure(
    truth: np.ndarray,
    predicted: np.ndarray,
    name: str,
    scores: dict[str, Interval] | None = None,
    folds: np.ndarray | None = None,
) -> Figure:
    """The figure of `scatter`."""
    known = np.isfinite(truth) & np.isfinite(predicted)
    x, y = truth[known], predicted[known]
    which = np.zeros(len(x), int) if folds is None else np.asarray(folds)[known]
    words = [f"{TITLES[k]} {v.value:.3f} ({v.low:.3f} to {v.high:.3f})" for k, v in (scores or {}).items()]
    subtitle = f"{len(x):,} cases, each predicted by a network that never saw it"
    figure = new_figure(
        5.6, 5.9, f"{name}: {words[0]}" if words else name, "\n".join([", ".join(words[1:3]), subtitle]).strip()
    )
    axes = figure.subplots()
    both = np.concatenate([x, y])
    low, high = (float(both.min()), float(both.max())) if both.size else (0.0, 1.0)
    margin = 0.04 * (high - low) or 1.0
    axes.plot([low - margin, high + margin], [low - margin, high + margin], color=MUTED, linewidth=1)
    for k in np.unique(which):
        colour, label = COLOURS[int(k) % len(COLOURS)], f"fold {k}" if folds is not None else None
        axes.plot(x[which == k], y[which == k], "o", color=colour, alpha=0.65, markersize=4.5, mew=0, label=label)
    axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
    axes.set(xlabel=f"{name}: true", ylabel=f"{name}: predicted")
    if folds is not None and 1 < len(np.unique(which)) <= len(COLOURS):
        axes.legend(loc="best", handletextpad=0.1)
    return figure
