"""Several runs in one picture: how they learned, and by how much they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sansmax.report.curves import SCORES, column
from sansmax.report.metrics import TITLES
from sansmax.report.resample import Interval
from sansmax.report.roc import cycle
from sansmax.report.style import GRID, INK, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def curves_of_runs(runs: Mapping[str, Rows], path: str | Path) -> Path:
    """Training loss, validation loss and score of several runs over their epochs, by their rows of metrics.csv."""
    with look():
        return save(curves_figure(runs), path)


def curves_figure(runs: Mapping[str, Rows]) -> Figure:
    """The figure of `curves_of_runs`."""
    from matplotlib.ticker import MaxNLocator

    score = next((n for n in SCORES if any(np.isfinite(column(rows, n)).any() for rows in runs.values())), "val_auc")
    panels = {
        "train_loss": "Training loss (nats)",
        "val_loss": "Validation loss (nats)",
        score: f"Validation {SCORES[score]}",
    }
    legend = 0.24 * len(runs)
    figure = new_figure(10.5, 3.7 + legend, "Learning curves", "dots: the epoch of the best value")
    axes = figure.subplots(1, 3)
    for ax, (name, title) in zip(axes, panels.items(), strict=True):
        ax.set_title(title)
        ax.set_xlabel("epoch")
        for (run, rows), colour in zip(runs.items(), cycle(len(runs)), strict=True):
            x, y = column(rows, "epoch"), column(rows, name)
            there = np.isfinite(x) & np.isfinite(y)
            if there.any():
                ax.plot(x[there], y[there], color=colour, label=run)
                best = np.nanargmax(y) if name in SCORES else np.nanargmin(y)
                ax.plot(x[best], y[best], "o", color=colour, markeredgecolor="white", markersize=7)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        ax.grid(axis="x", visible=False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=1 if max(map(len, runs)) > 40 else 2)
    return figure


def difference_picture(differences: Mapping[str, Mapping[str, Interval]], first: str, path: str | Path) -> Path:
    """The differences of runs from the `first` one with their intervals, a panel for each score."""
    with look():
        return save(difference_figure(differences, first), path)


def difference_figure(differences: Mapping[str, Mapping[str, Interval]], first: str) -> Figure:
    """The figure of `difference_picture`."""
    runs = list(differences)
    scores = [name for name in next(iter(differences.values())) if name in TITLES]
    columns = min(4, len(scores))
    rows = -(-len(scores) // columns)
    height = 0.75 + rows * (0.9 + 0.34 * len(runs))
    subtitle = f"compared with {first}; bars: 95 % interval of the paired bootstrap; an interval without 0 is filled"
    figure = new_figure(11.5, height, "By how much the runs differ", subtitle)
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False, sharey=True)).ravel()
    for ax, name in zip(axes, scores, strict=False):
        ax.set_title(TITLES[name])
        ax.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        for i, (run, colour) in enumerate(zip(runs, cycle(len(runs) + 1)[1:], strict=True)):
            gap = differences[run][name]
            if np.isfinite(gap.low):
                clear = gap.low > 0 or gap.high < 0
                ax.plot([gap.low, gap.high], [i, i], color=colour, linewidth=2)
                ax.plot(gap.value, i, "o", color=colour, markersize=8, markerfacecolor=colour if clear else "white")
        ax.set_yticks(range(len(runs)), runs)
        ax.set_ylim(len(runs) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color=GRID)
        ax.tick_params(axis="y", length=0)
        ax.locator_params(axis="x", nbins=4)
    for ax in axes[len(scores) :]:
        ax.set_visible(False)
    return figure
