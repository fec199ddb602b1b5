"""Receiver operating characteristics of several models in one picture."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sansmax.errors import InputError
from sansmax.report.metrics import measure
from sansmax.report.resample import Interval
from sansmax.report.style import COLOURS, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]


def roc_curves(
    curves: Curves,
    classes: Sequence[str],
    path: str | Path,
    *,
    groups: Sequence[Hashable] | None = None,
    intervals: Mapping[str, Interval] | None = None,
    title: str = "",
) -> Path:
    """One line per model of `{name: (labels, probabilities)}`, with its AUC and interval in the legend.

    With two classes the last is the positive one. With more, lines are means over the classes, each against the
    rest, and thin lines are the classes of the first model. `intervals` are AUCs known already; those not given are
    computed, over patients where `groups` names them.
    """
    with look():
        return save(roc_figure(curves, classes, groups, intervals, title), path)


def roc_figure(
    curves: Curves,
    classes: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    intervals: Mapping[str, Interval] | None = None,
    title: str = "",
) -> Figure:
    """The figure of `roc_curves`."""
    if not curves:
        raise InputError("roc_curves needs at least one model: {name: (labels, probabilities)}")
    areas = dict(intervals or {})
    for name in [n for n in curves if n not in areas]:
        areas[name] = measure(*curves[name], classes, groups, resamples=1000)["auc"]
    first = next(iter(curves))
    two = len(classes) == 2
    of = f" of {classes[-1]!r} against {classes[0]!r}" if two else f", mean of {len(classes)} classes against the rest"
    value = areas[first].value
    title = title or (f"{first}: AUC {value:.3f}" if np.isfinite(value) else "No ROC curve")
    figure = new_figure(5.9, 5.7, title, f"ROC curve{of}; brackets: 95 % interval")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#b8c0c8", linewidth=1, linestyle=(0, (4, 3)), label="chance 0.500")
    if not two:
        thin_lines(axes, curves[first], COLOURS[0], f"classes of {first}")
    for (name, (labels, p)), colour in zip(curves.items(), cycle(len(curves)), strict=True):
        x, y = roc_points(labels, p[:, -1], 1) if two else mean_curve(np.asarray(labels), p)
        axes.plot(x, y, color=colour, linewidth=2.2, label=f"{name}  {area_text(areas[name])}", zorder=4)
    handles, names = axes.get_legend_handles_labels()
    # drawn first is read last: the models come before what they are compared with
    models = len(names) - len(curves)
    axes.legend(
        handles[models:] + handles[:models],
        names[models:] + names[:models],
        loc="lower right",
        title="AUC",
        alignment="left",
    )
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set(xlabel="1 - specificity (false positive rate)", ylabel="sensitivity (true positive rate)")
    return figure


def cycle(count: int) -> list[str]:
    """`count` colours, from the start again when they run out."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def area_text(area: Interval) -> str:
    """The area with its interval, as the legend says it."""
    if np.isnan(area.value):
        return "not defined"
    return f"{area.value:.3f}" + ("" if np.isnan(area.low) else f" ({area.low:.3f} to {area.high:.3f})")


def roc_points(labels: np.ndarray, scores: np.ndarray, positive: int) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate from the strictest threshold to the loosest; NaN without both kinds."""
    is_positive = np.asarray(labels) == positive
    if is_positive.all() or not is_positive.any():
        return np.array([np.nan, np.nan]), np.array([np.nan, np.nan])
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    hits = np.cumsum(is_positive[order])[ends]
    misses = ends + 1 - hits
    return np.append(0, misses / misses[-1]), np.append(0, hits / hits[-1])


def mean_curve(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean sensitivity of the classes at each false positive rate; classes that are absent are left out."""
    points = [roc_points(labels, column, c) for c, column in enumerate(probabilities.T)]
    there = [(x, y) for x, y in points if np.isfinite(x).all()]
    if not there:
        return np.array([np.nan]), np.array([np.nan])
    at = np.unique(np.concatenate([[0.0]] + [x for x, _ in there]))
    # at a vertical step the curve is read at its top
    mean = np.mean([np.interp(at, x, y) for x, y in map(tops, there)], axis=0)
    return np.append(0, at), np.append(0, mean)


def tops(curve: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The curve with the upper end of each vertical step only."""
    x, y = curve
    last = np.append(x[1:] != x[:-1], True)
    return x[last], y[last]


def thin_lines(axes: Axes, curve: tuple[np.ndarray, np.ndarray], colour: str, name: str) -> None:
    """The classes of one model, pale."""
    labels, probabilities = curve
    for c, column in enumerate(np.asarray(probabilities).T):
        x, y = roc_points(labels, column, c)
        label = name if c == 0 else None
        axes.plot(x, y, color=colour, alpha=0.28, linewidth=0.9, label=label)
