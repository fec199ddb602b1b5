"""A sheet of small pictures with a line of text above each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sansmax.errors import InputError
from sansmax.report.pictures import thumbnail
from sansmax.report.style import POSITIVE, bare, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 1.75
LONGEST = 512


def sample_grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    path: str | Path,
    *,
    columns: int | None = None,
    title: str = "",
    note: str = "",
    wrong: Sequence[bool] | None = None,
) -> Path:
    """Pictures of any sizes and dtypes in rows of up to `columns`; titles of those marked `wrong` are red."""
    with look():
        return save(grid_figure(images, titles, columns, title, note, wrong), path)


def grid_figure(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    columns: int | None = None,
    title: str = "",
    note: str = "",
    wrong: Sequence[bool] | None = None,
) -> Figure:
    """The figure of `sample_grid`."""
    if not len(images) or len(images) != len(titles):
        raise InputError(f"a grid needs one title for each of its images: {len(images)} images, {len(titles)} titles")
    columns = min(columns or 6, len(images))
    rows = -(-len(images) // columns)
    texts = [wrapped(text) for text in titles]
    lines = max(text.count("\n") + 1 for text in texts)
    ratio = float(np.clip(np.median([im.shape[0] / im.shape[1] for im in images]), 0.4, 1.8))
    head = 0.12 + 0.25 * bool(title) * (title.count("\n") + 1) + 0.19 * bool(note) + 0.1
    width = max(columns * (CELL + 0.12) + 0.1, 4.5 if title else 0)
    figure = new_figure(width, rows * (CELL * ratio + 0.15 * lines + 0.16) + head, title, note)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        bare(ax)
    for i, (ax, image, text) in enumerate(zip(axes[: len(images)], images, texts, strict=True)):
        ax.imshow(thumbnail(np.asarray(image), LONGEST), interpolation="antialiased")
        colour = {"color": POSITIVE} if wrong is not None and wrong[i] else {}
        ax.set_title(text, fontsize=8, pad=4, **colour)
    return figure


def wrapped(text: str) -> str:
    """The text in lines that fit above a picture, its own line breaks kept, three lines at most."""
    lines = [piece for line in text.split("\n") for piece in textwrap.wrap(line, 23) or [""]]
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], lines[2][:20] + "..."])
