"""How training went: loss, accuracy and learning rate over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sansmax.errors import InputError
from sansmax.report.style import COLOURS, GRID, INK, MUTED, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, TEAL = COLOURS[:3]
Series = tuple[np.ndarray, str, str]
# columns that are larger for a better network, and their names in words
SCORES = {"val_auc": "AUC", "val_r2": "R2", "val_c_index": "c-index", "val_accuracy": "accuracy"}


def learning_curves(rows: Sequence[Mapping[str, Any]], path: str | Path, *, monitor: str = "", title: str = "") -> Path:
    """Loss, accuracy with AUC, and learning rate of a run from the rows of its `metrics.csv`; kept epoch marked.

    Empty cells are gaps. The epoch marked is the best by `monitor`: a column such as `val_loss` or `val_auc`,
    "val_score" for the first of `SCORES` that is there, or the "last" one. Without it, that of the largest score; where
    there is none, of the smallest `val_loss`. A title that is not given states it.
    """
    with look():
        return save(learning_figure(rows, title, monitor), path)


def learning_figure(rows: Sequence[Mapping[str, Any]], title: str = "", monitor: str = "") -> Figure:
    """The figure of `learning_curves`."""
    if not rows:
        raise InputError("there are no rows to draw learning curves from; train for at least one epoch")
    x, unit = column(rows, "epoch"), "epoch"
    if np.isnan(x).all():
        x, unit = column(rows, "step"), "step"
    best, name, value = best_row(rows, monitor)
    if best is not None and not title:
        last = f" of {x[-1]:g}" if len(rows) > 1 else ""
        kept = f"Last {unit}" if monitor == "last" else f"Best {unit} {x[best]:g}{last}"
        title = f"{kept}: validation {SCORES.get(name, 'loss')} {value:.3f}"
    parts = []
    for what in ("images", "tokens"):
        speed = column(rows, f"{what}_per_second")
        parts += [f"{np.nanmedian(speed):,.0f} {what} per second"] if np.isfinite(speed).any() else []
    seconds = column(rows, "seconds")
    parts += [f"{duration(float(np.nanmax(seconds)))} of training"] if np.isfinite(seconds).any() else []
    figure = new_figure(10.5, 3.7, title or "Learning curves", ", ".join(parts))
    shown = [panel for panel in panels(rows) if any(np.isfinite(y).any() for y, _, _ in panel[1])]
    if not shown:
        raise InputError("the rows hold no loss, accuracy, AUC or learning rate; write at least one of these columns")
    for axes, (heading, series) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.set_title(heading)
        lines(axes, x, series)
        finish(axes, x, unit, None if best is None else float(x[best]))
    return figure


def panels(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Series]]]:
    """Heading and series of each panel; the learning rate in units of its power of ten."""
    rate = column(rows, "lr")
    largest = np.nanmax(rate, initial=0) if np.isfinite(rate).any() else 0
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    return [
        (
            "Loss (nats)",
            [(column(rows, "train_loss"), "training", BLUE), (column(rows, "val_loss"), "validation", ORANGE)],
        ),
        (
            "Validation (1 is perfect)",
            [
                (column(rows, name), words, TEAL if name == "val_accuracy" else ORANGE)
                for name, words in reversed(SCORES.items())
            ],
        ),
        (f"Learning rate (1e{power})" if power else "Learning rate", [(rate / 10.0**power, "", MUTED)]),
    ]


def column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """One column as floats, NaN where a cell is missing or empty."""
    cells = [row.get(name) for row in rows]
    return np.array([np.nan if cell in (None, "") else float(cell) for cell in cells])  # pyright: ignore[reportArgumentType]


def best_row(rows: Sequence[Mapping[str, Any]], monitor: str = "") -> tuple[int | None, str, float]:
    """Index of the row whose weights are kept, the column that decided (or tells how good it is), its value there."""
    signs = {**dict.fromkeys(SCORES, 1), "val_loss": -1}
    for name in sorted(signs, key=lambda n: n != monitor):
        values = column(rows, name)
        if np.isfinite(values).any():
            best = len(rows) - 1 if monitor == "last" else int(np.nanargmax(signs[name] * values))
            return best, name, float(values[best])
    return None, "", float("nan")


def duration(seconds: float) -> str:
    """Seconds in words: "42 s", "3 min 10 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def lines(axes: Axes, x: np.ndarray, series: Sequence[Series]) -> None:
    """Draws what there is of each series; short ones with a dot per value."""
    for y, label, colour in series:
        there = np.isfinite(y) & np.isfinite(x)
        if there.any():
            dots = {"marker": "o", "markersize": 4} if there.sum() <= 25 else {}
            axes.plot(x[there], y[there], color=colour, label=label, **dots)
    if any(label for _, label, _ in series) and axes.lines:
        axes.legend(loc="best")


def finish(axes: Axes, x: np.ndarray, unit: str, best: float | None) -> None:
    """Axis, best epoch and limits that suit one row as well as hundreds."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if best is not None:
        axes.axvline(best, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        for line in list(axes.lines)[:-1]:
            at = np.flatnonzero(np.asarray(line.get_xdata()) == best)
            y = np.asarray(line.get_ydata())[at]
            axes.plot([best] * len(at), y, "o", color=line.get_color(), markeredgecolor="white", markersize=7, zorder=5)
    finite = x[np.isfinite(x)]
    if len(finite) and finite.min() == finite.max():
        axes.set_xlim(finite[0] - 1, finite[0] + 1)
    axes.grid(axis="x", visible=False)
    axes.grid(axis="y", color=GRID)
