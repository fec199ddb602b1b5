"""Names beside the ends of lines, placed where they touch neither each other nor a line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

SIZE = 8.8
# average width of a bold letter and height of a line, in parts of the size of the type
LETTER, LINE = 0.62, 1.3
# where a text may stand, in points from the end of its line, the best first: at the right, then at the left
SHIFTS = [(10, dy) for dy in (0, 6, -6, 12, -12, 18, -18, 25, -25, 32, -32, 40, -40)]
SHIFTS += [(dx, dy) for dx in (-8, -30, -60) for dy in (4, 10, -8, 16, 24, 34, -20)]
ROUNDS = 6


class Label(NamedTuple):
    """A text for the point `(x, y)` of the data."""

    x: float
    y: float
    text: str
    colour: str
    bold: bool = True


class Box(NamedTuple):
    """A rectangle in points."""

    left: float
    bottom: float
    right: float
    top: float

    def covers(self, points: np.ndarray) -> int:
        """How many of the points `(n, 2)` lie inside."""
        x, y = points[:, 0], points[:, 1]
        return int(((x > self.left) & (x < self.right) & (y > self.bottom) & (y < self.top)).sum())

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )


def place_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes each label beside its point where it hides least, moving all of them until none can be bettered.

    The lines in `axes` so far are what is to be kept clear, dotted ones less so. Limits must be final.
    """
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    unit = 72 / figure.dpi
    strong = [samples(axes, line) for line in axes.lines if line.get_linestyle() != ":"]
    weak = [samples(axes, line)[::4] for line in axes.lines if line.get_linestyle() == ":"]
    # the marks at the ends weigh more than the lines
    marks = [np.repeat(line[-1:], 20, axis=0) for line in strong]
    occupied = unit * np.concatenate([np.empty((0, 2)), *strong, *weak, *marks])
    frame = Box(*(unit * v for v in axes.bbox.extents))
    points = [unit * axes.transData.transform((label.x, label.y)) for label in labels]
    choices = [[box_at(at, shift, label.text) for shift in SHIFTS] for at, label in zip(points, labels, strict=True)]
    alone = [[cost(box, rank, frame, occupied) for rank, box in enumerate(boxes)] for boxes in choices]
    chosen = [int(np.argmin(costs)) for costs in alone]
    for _ in range(ROUNDS):
        for i, boxes in enumerate(choices):
            # names of lines come first: those of guides make room for them, not the other way round
            others = [
                (choices[j][c], 30 if labels[i].bold and not labels[j].bold else 1000)
                for j, c in enumerate(chosen)
                if j != i
            ]
            costs = [
                a + sum(weight for other, weight in others if box.meets(other))
                for a, box in zip(alone[i], boxes, strict=True)
            ]
            chosen[i] = int(np.argmin(costs))
    for label, choice in zip(labels, chosen, strict=True):
        write(axes, label, SHIFTS[choice])


def write(axes: Axes, label: Label, shift: tuple[float, float]) -> None:
    """The text `shift` points from its point, with a white rim against the lines it may cross."""
    from matplotlib.patheffects import withStroke

    axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=shift,
        textcoords="offset points",
        ha="left" if shift[0] > 0 else "right",
        multialignment="left",
        va="center",
        fontsize=SIZE if label.bold else SIZE - 1,
        color=label.colour,
        fontweight="bold" if label.bold else "normal",
        linespacing=1.1,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        zorder=7,
    )


def samples(axes: Axes, line: Line2D) -> np.ndarray:
    """Points along a line, close enough that no text slips between them, in pixels."""
    ends = axes.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]))
    if len(ends) < 2:
        return ends
    steps = np.linspace(0, 1, 40)[:, None]
    return np.concatenate([a + steps * (b - a) for a, b in pairwise(ends)])


def box_at(at: np.ndarray, shift: tuple[float, float], text: str) -> Box:
    """The rectangle that `text` would fill."""
    rows = text.split("\n")
    width, height = LETTER * SIZE * max(map(len, rows)), LINE * SIZE * len(rows)
    left = at[0] + shift[0] - (width if shift[0] < 0 else 0)
    middle = at[1] + shift[1]
    return Box(left, middle - height / 2, left + width, middle + height / 2)


def cost(box: Box, rank: int, frame: Box, occupied: np.ndarray) -> float:
    """How bad a place is on its own: outside the frame worst, over lines bad, far from its point a little."""
    outside = box.left < frame.left or box.right > frame.right + 4 or box.top > frame.top or box.bottom < frame.bottom
    return 3000 * outside + 10 * box.covers(occupied) + 2 * rank
