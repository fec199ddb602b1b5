"""Deletion and insertion curves: the answer while tokens are removed or added by score, beside random orders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sansmax.report.style import COLOURS, MUTED, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CurveSet:
    """Answers along both curves of one picture or bag, or of the mean of some.

    `removed` and `present` `(s,)` are shares of the tokens; `deletion[i]` is the answer with the share `removed[i]` of
    the highest scores gone, `insertion[i]` that with the share `present[i]` of them alone. `random_deletion` and
    `random_insertion` `(orders, s)` are the same in random order.
    """

    removed: np.ndarray
    present: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray
    random_deletion: np.ndarray
    random_insertion: np.ndarray

    def areas(self) -> dict[str, float]:
        """The mean height of each curve over its shares; that of random orders is their mean."""
        return {
            "deletion": mean_height(self.removed, self.deletion),
            "random_deletion": mean_height(self.removed, self.random_deletion.mean(axis=0)),
            "insertion": mean_height(self.present, self.insertion),
            "random_insertion": mean_height(self.present, self.random_insertion.mean(axis=0)),
        }


def mean_height(x: np.ndarray, y: np.ndarray) -> float:
    """The area below a curve of straight pieces over the width it covers."""
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


def deletion_picture(curves: CurveSet, path: str | Path, *, title: str = "", answer: str = "log-odds") -> Path:
    """PNG of both curves side by side, the range of the random orders grey, areas in the legend."""
    with look():
        return save(deletion_figure(curves, title, answer), path)


def deletion_figure(curves: CurveSet, title: str = "", answer: str = "log-odds") -> Figure:
    """The figure of `deletion_picture`."""
    areas = curves.areas()
    note = "Areas: mean height of a curve. Grey: range and mean of random orders."
    figure = new_figure(9.2, 3.9, title or "Deletion and insertion", note)
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(
        left,
        100 * curves.removed,
        curves.deletion,
        curves.random_deletion,
        (areas["deletion"], areas["random_deletion"]),
        COLOURS[0],
    )
    left.set(title="Deletion: lower is better", xlabel="tokens removed (%)", ylabel=answer)
    _panel(
        right,
        100 * curves.present,
        curves.insertion,
        curves.random_insertion,
        (areas["insertion"], areas["random_insertion"]),
        COLOURS[1],
    )
    right.set(title="Insertion: higher is better", xlabel="tokens present (%)")
    return figure


def _panel(
    axes: Axes, x: np.ndarray, y: np.ndarray, randoms: np.ndarray, areas: tuple[float, float], colour: str
) -> None:
    axes.fill_between(x, randoms.min(axis=0), randoms.max(axis=0), color=MUTED, alpha=0.25, linewidth=0)
    axes.plot(x, randoms.mean(axis=0), color=MUTED, linewidth=1.4, label=f"random order, area {areas[1]:.3g}")
    axes.plot(x, y, color=colour, label=f"by score, area {areas[0]:.3g}")
    axes.set_xlim(0, 100)
    axes.legend(loc="best")
