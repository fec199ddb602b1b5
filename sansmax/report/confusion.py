"""Which class is taken for which."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sansmax.report.metrics import checked
from sansmax.report.style import look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


def confusion_matrix(
    labels: Sequence[int] | np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
    unit: str = "image",
) -> Path:
    """Images by true class (row) and predicted class (column), as counts and per cent of the row.

    `unit` is what is counted, one of it in words.
    """
    with look():
        return save(confusion_figure(labels, probabilities, classes, title, unit), path)


def confusion_figure(
    labels: Sequence[int] | np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    title: str = "",
    unit: str = "image",
) -> Figure:
    """The figure of `confusion_matrix`."""
    y, p, names = checked(labels, probabilities, classes)
    k = len(names)
    counts = np.zeros((k, k), int)
    np.add.at(counts, (y, p.argmax(axis=1)), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = int(np.trace(counts))
    subtitle = f"{right} of {len(y)} {unit}s right; each row sums to 100 %"
    cell = 1.25 if k <= 3 else 0.66 if k <= 10 else 0.47
    margin = min(2.2, 0.5 + 0.075 * min(18, max(map(len, names))))
    size = k * cell
    title = title or finding(counts, names, unit)
    figure = new_figure(max(4.6, size + margin + 0.5), size + margin + 0.9, title, subtitle)
    axes = figure.subplots()
    axes.imshow(share, cmap=blues(), vmin=0, vmax=1, aspect="equal")
    name_axes(axes, names)
    write_cells(axes, counts, share, cell)
    return figure


def finding(counts: np.ndarray, names: Sequence[str], unit: str = "image") -> str:
    """The most frequent confusion, in words."""
    wrong = counts - np.diag(np.diag(counts))
    if not wrong.any():
        return f"No {unit} was taken for another class"
    i, j = divmod(int(wrong.argmax()), len(wrong))
    short = [textwrap.shorten(names[c], 22, placeholder="...") or names[c][:22] for c in (i, j)]
    return f"Most frequent error: {short[0]} taken\nfor {short[1]}, {wrong[i, j]} of {counts[i].sum()} {unit}s"


def blues() -> Colormap:
    """White to the project's blue."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", ["#ffffff", "#d3e6f5", "#7cb8e0", "#0077bb", "#00466e"])


def wrapped(name: str) -> str:
    """A long name on up to three lines of 18 characters, the rest cut."""
    pieces = textwrap.wrap(name, 18) or [""]
    if len(pieces) > 3:
        pieces = [*pieces[:2], pieces[2][:15] + "..."]
    return "\n".join(pieces)


def name_axes(axes: Axes, names: Sequence[str]) -> None:
    """Class names at both sides; slanted below where they would touch."""
    labels = [wrapped(name) for name in names]
    places = np.arange(len(names))
    longest = max(len(line) for label in labels for line in label.split("\n"))
    size = 8.5 if len(names) <= 10 else 7.5
    axes.set_yticks(places, labels, fontsize=size)
    axes.set_xticks(places, labels, fontsize=size)
    if longest > (14 if len(names) <= 3 else 7 if len(names) <= 10 else 4):
        if len(names) > 10:
            axes.tick_params(axis="x", rotation=90)
        else:
            axes.set_xticks(places, labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    edges = np.arange(len(names) + 1) - 0.5
    axes.hlines(edges, -0.5, len(names) - 0.5, color="#dfe4e8", linewidth=0.8)
    axes.vlines(edges, -0.5, len(names) - 0.5, color="#dfe4e8", linewidth=0.8)


def write_cells(axes: Axes, counts: np.ndarray, share: np.ndarray, cell: float) -> None:
    """Count and per cent in each cell that holds an image; nothing in an empty one."""
    large = 14 if cell > 0.9 else 10 if cell > 0.6 else 7.8
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center"}
    for (i, j), count in np.ndenumerate(counts):
        if count:
            colour = "white" if share[i, j] > 0.5 else "#1f2933"
            axes.annotate(f"{count}", (j, i), xytext=(0, 0.5 * large), color=colour, fontsize=large, **place)
            percent = f"{100 * share[i, j]:.0f} %"
            axes.annotate(percent, (j, i), xytext=(0, -0.65 * large), color=colour, fontsize=0.72 * large, **place)
