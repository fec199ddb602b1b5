"""ROC and precision-recall curves of cross-validation: a thin line per fold, all folds together with a 95 % band."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sansmax.report.resample import Interval, draw_weights, group_codes
from sansmax.report.roc import area_text
from sansmax.report.style import COLOURS, MUTED, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESAMPLES = 500
GRID = np.linspace(0, 1, 201)


def fold_curves(
    positive: np.ndarray,
    scores: np.ndarray,
    folds: np.ndarray,
    name: str,
    path: str | Path,
    *,
    groups: Sequence[Hashable] | None = None,
    auc: Interval | None = None,
    average_precision: Interval | None = None,
) -> Path:
    """Both curves of one class `name`: `positive` `(n,)` is true for its cases, `scores` `(n,)` are larger for it.

    The band holds 95 % of the curves of resamples of whole patients (`groups`), at each point of the axis by itself.
    """
    with look():
        return save(fold_figure(positive, scores, folds, name, groups, auc, average_precision), path)


def fold_figure(
    positive: np.ndarray,
    scores: np.ndarray,
    folds: np.ndarray,
    name: str,
    groups: Sequence[Hashable] | None = None,
    auc: Interval | None = None,
    average_precision: Interval | None = None,
) -> Figure:
    """The figure of `fold_curves`."""
    positive = np.asarray(positive, bool)
    count = int(positive.sum())
    subtitle = f"{count:,} of {len(positive):,} cases are positive; brackets and bands: 95 % over resampled patients"
    figure = new_figure(10.2, 5.4, f"{name}: AUROC {area_text(auc)}" if auc else name, subtitle)
    left, right = figure.subplots(1, 2)
    roc_bands, pr_bands = bands(positive, scores, groups)
    there = np.unique(folds)
    for k in there if len(there) > 1 else ():
        own = folds == k
        if positive[own].any() and not positive[own].all():
            for axes, (x, y) in zip((left, right), curves(positive[own], scores[own]), strict=True):
                axes.plot(x, y, color=COLOURS[0], alpha=0.35, linewidth=0.9, label="folds" if k == there[0] else None)
    if 0 < count < len(positive):
        areas = (auc, average_precision)
        for axes, (x, y), band, area in zip(
            (left, right), curves(positive, scores), (roc_bands, pr_bands), areas, strict=True
        ):
            if band is not None:
                axes.fill_between(GRID, *band, color=COLOURS[0], alpha=0.13, linewidth=0)
            text = f"all  {area_text(area)}" if area else "all"
            axes.plot(x, y, color=COLOURS[0], linewidth=2.2, label=text, zorder=4)
    left.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="chance 0.500")
    share = count / max(1, len(positive))
    right.axhline(share, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"chance {share:.3f}")
    left.set(xlabel="1 - specificity (false positive rate)", ylabel="sensitivity (true positive rate)")
    right.set(xlabel="sensitivity (recall)", ylabel="precision (positive predictive value)")
    for axes, title, place in ((left, "AUROC", "lower right"), (right, "AUPRC", "lower left")):
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axes.legend(loc=place, title=title, alignment="left")
    return figure


def curves(positive: np.ndarray, scores: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """The points of the ROC curve and of the precision-recall curve, from the strictest threshold to the loosest."""
    hits, misses = counts(positive, scores, np.ones((len(scores), 1)))
    hits, misses = hits[:, 0], misses[:, 0]
    roc = np.append(0, misses / misses[-1]), np.append(0, hits / hits[-1])
    precision = hits / (hits + misses)
    return roc, (np.append(0, hits / hits[-1]), np.append(precision[0], precision))


def counts(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weight of positive and of negative cases at and above each distinct score, `(thresholds, r)` each."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    w = weights[order]
    hits = np.cumsum(w * positive[order, None], axis=0)[ends]
    return hits, np.cumsum(w, axis=0)[ends] - hits


def bands(
    positive: np.ndarray, scores: np.ndarray, groups: Sequence[Hashable] | None
) -> tuple[tuple[np.ndarray, np.ndarray] | None, tuple[np.ndarray, np.ndarray] | None]:
    """Lower and upper end of the band of either curve along `GRID`; None where resamples have one kind only."""
    codes = group_codes(groups, len(scores))
    weights = next(draw_weights(codes, RESAMPLES, 0, RESAMPLES))
    hits, misses = counts(positive, scores, weights)
    both = (hits[-1] > 0) & (misses[-1] > 0)
    if both.sum() < RESAMPLES / 2:
        return None, None
    hits, misses = hits[:, both], misses[:, both]
    tpr, fpr = hits / hits[-1], misses / misses[-1]
    precision = hits / np.maximum(hits + misses, 1e-300)
    roc = np.stack([np.interp(GRID, np.append(0, x), np.append(0, y)) for x, y in zip(fpr.T, tpr.T, strict=True)])
    seen = hits + misses > 0
    pr = np.stack([np.interp(GRID, tpr[s, i], precision[s, i]) for i, s in enumerate(seen.T)])
    return tuple(np.percentile(c, (2.5, 97.5), axis=0) for c in (roc, pr))  # pyright: ignore[reportReturnType]
