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
LETTER, LINE = 0.58, 1.25
# where a text may stand, in points from the end of its line: beside, above, below, then to the left above
SHIFTS = [(10, dy) for dy in (0, 7, -7, 13, -13, 20, -20, 27, -27, 34, -34, 42)]
LEFT_SHIFTS = [(-8, dy) for dy in (8, 3, 14, 20, 28, 36, -8)]


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
    """Writes each label beside its point, the first free place of a few, else the one that hides least.

    The lines and texts in `axes` so far are what is to be kept clear. Limits must be final.
    """
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    points_per_pixel = 72 / figure.dpi
    occupied = np.concatenate([np.empty((0, 2)), *(samples(axes, line) for line in axes.lines)]) * points_per_pixel
    frame = Box(*(points_per_pixel * v for v in axes.bbox.extents))
    boxes = [Box(*(points_per_pixel * v for v in t.get_window_extent().extents)) for t in axes.texts]
    for label in labels:
        at = axes.transData.transform((label.x, label.y)) * points_per_pixel
        choices = [(shift, box_at(at, shift, label.text)) for shift in SHIFTS + LEFT_SHIFTS]
        costs = [cost(box, rank, frame, boxes, occupied) for rank, (_, box) in enumerate(choices)]
        shift, box = choices[int(np.argmin(costs))]
        boxes.append(box)
        side = "left" if shift[0] > 0 else "right"
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=shift,
            textcoords="offset points",
            ha=side,
            multialignment="left",
            va="center",
            fontsize=SIZE if label.bold else SIZE - 1,
            color=label.colour,
            fontweight="bold" if label.bold else "normal",
            linespacing=1.1,
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


def cost(box: Box, rank: int, frame: Box, boxes: Sequence[Box], occupied: np.ndarray) -> float:
    """How bad a place is: texts over texts and outside the frame worst, over lines bad, far from the point a little."""
    outside = box.left < frame.left or box.right > frame.right or box.top > frame.top or box.bottom < frame.bottom
    return 1000 * sum(box.meets(b) for b in boxes) + 2000 * outside + 10 * box.covers(occupied) + rank
