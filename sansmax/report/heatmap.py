"""Where in the picture the model found its answer, beside the truth where there is one.

A score is signed: positive patches speak for the class, negative ones against it. The picture is drawn grey and pale
below the colours, so that a strong colour is a strong score and no colour is none.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sansmax.errors import InputError
from sansmax.files import replacing
from sansmax.report.pictures import as_rgb, fitted, stretched, thumbnail
from sansmax.report.style import COLOURS, MUTED, bare, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

LONGEST = 1024
BAND = 256
ROBUST = 99
# panels of pictures flatter than this (height / width) stand one above the other
STACKED = 0.45


def heatmap(
    pixels: np.ndarray,
    scores: np.ndarray,
    path: str | Path,
    truth: np.ndarray | None = None,
    *,
    title: str = "",
    class_name: str = "the class",
    note: str = "",
    truth_names: Mapping[int, str] | None = None,
) -> Path:
    """The picture, its signed patch scores, and the truth, side by side; a wide picture's panels are stacked.

    `pixels` `(height, width[, 3])` may be far larger than the screen; `scores` `(rows, columns)` covers all of it,
    NaN where no patch was looked at. `truth` is a grid of any size over the same picture, bool or int (0 = nothing),
    with `truth_names` for the values.
    """
    with look():
        return save(heatmap_figure(pixels, scores, truth, title, class_name, note, truth_names), path)


def heatmap_overlay(pixels: np.ndarray, scores: np.ndarray, path: str | Path, *, limit: float | None = None) -> Path:
    """The coloured picture alone, pixel for pixel as large as `pixels`; `limit` is the score of full colour."""
    from matplotlib.image import imsave

    check_grid(scores)
    limit = limit or robust_limit(scores)
    white = brightest(thumbnail(pixels, LONGEST))
    h, w = pixels.shape[:2]
    out = np.empty((h, w, 3), np.uint8)
    for top in range(0, h, BAND):
        rows = np.arange(top, min(h, top + BAND))
        cells = scores[(rows * scores.shape[0]) // h][:, (np.arange(w) * scores.shape[1]) // w]
        out[rows] = np.round(255 * tinted(as_rgb(pixels[top : top + BAND]), cells, limit, white)).astype(np.uint8)
    with replacing(path) as temporary:
        imsave(temporary, out, format="png")
    return Path(path)


def heatmap_figure(
    pixels: np.ndarray,
    scores: np.ndarray,
    truth: np.ndarray | None = None,
    title: str = "",
    class_name: str = "the class",
    note: str = "",
    truth_names: Mapping[int, str] | None = None,
) -> Figure:
    """The figure of `heatmap`."""
    scores = np.asarray(scores)
    check_grid(scores)
    picture = thumbnail(pixels, LONGEST)
    shown = 2 if truth is None else 3
    figure, panels, bar = panel_figure(pixels.shape[0] / pixels.shape[1], shown, title, note)
    limit = robust_limit(scores)
    # a picture of few pixels is drawn at no less than a few hundred, so that patches have sharp edges
    cells = stretched(scores, *picture.shape[:2]) if min(picture.shape[:2]) >= max(scores.shape) else scores
    base = picture if cells.shape == picture.shape[:2] else stretched_rgb(picture, cells.shape)
    panels[0].imshow(picture, interpolation="antialiased", aspect="auto")
    panels[0].set_title(f"Picture, {pixels.shape[1]:,} x {pixels.shape[0]:,} px")
    panels[1].imshow(tinted(base, cells, limit, brightest(picture)), interpolation="antialiased", aspect="auto")
    panels[1].set_title(f"Scores of {scores.shape[1]} x {scores.shape[0]} patches")
    add_scale(bar, limit, scores, class_name)
    if truth is not None:
        draw_truth(panels[2], picture, np.asarray(truth), truth_names or {})
    return figure


def panel_figure(ratio: float, count: int, title: str, note: str) -> tuple[Figure, list[Axes], Axes]:
    """A figure with panels of the proportion `ratio` (height / width) and room for a colour bar below the second."""
    stacked, edge, gap, head, foot = ratio < STACKED, 0.1, 0.3, 0.34, 1.1
    wide = 8.6 if stacked else 3.6 if ratio < 1.3 else 2.9
    high = wide * min(max(ratio, 0.06), 3)
    titles = 0.12 + 0.25 * (title.count("\n") + 1 if title else 0) + 0.19 * (note.count("\n") + 1 if note else 0)
    width = 2 * edge + (wide if stacked else count * wide + (count - 1) * gap)
    height = titles + (count * (head + high) + foot + 0.3 * (count - 2) if stacked else head + high + foot)
    figure = new_figure(width, height, title, note)
    figure.set_layout_engine("none")
    panels, bottoms = [], []
    for i in range(count):
        left = edge if stacked else edge + i * (wide + gap)
        bottom = height - titles - head - high - ((i * (head + high) + foot * (i > 1)) if stacked else 0)
        panels.append(figure.add_axes((left / width, bottom / height, wide / width, high / height)))
        bare(panels[-1])
        bottoms.append(bottom)
    inset = 0.25 * wide if stacked else 0.03 * wide
    left = edge if stacked else edge + wide + gap
    place = (left + inset) / width, (bottoms[1] - 0.22) / height, (wide - 2 * inset) / width, 0.11 / height
    return figure, panels, figure.add_axes(place)


def check_grid(scores: np.ndarray) -> None:
    """Refuses what is not a grid."""
    if np.ndim(scores) != 2 or not np.size(scores):
        raise InputError(f"scores must be a grid (rows, columns), not {np.shape(scores)}; reshape the scores of tokens")


def robust_limit(scores: np.ndarray) -> float:
    """The score of full colour: the 99th percentile of the sizes, the largest where that is zero, else 1."""
    sizes = np.abs(scores[np.isfinite(scores)]).astype(np.float64)
    if not sizes.size:
        return 1.0
    return float(np.percentile(sizes, ROBUST) or sizes.max() or 1.0)


def colours() -> Colormap:
    """Blue over near-white to red: dark ends and equal steps, told apart without seeing red or green."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = ["#08306b", "#1460aa", "#5aa2d4", "#eef0f2", "#f2945c", "#c8351c", "#7a0c12"]
    return LinearSegmentedColormap.from_list("against_for", stops)


def luminance(picture: np.ndarray) -> np.ndarray:
    """How bright each pixel of an RGB picture looks, from 0 to 1."""
    return picture @ np.array([0.299, 0.587, 0.114], np.float32)


def brightest(picture: np.ndarray) -> float:
    """The luminance drawn as white, so that dark pictures keep their structure when they are pale."""
    return max(float(np.percentile(luminance(picture), ROBUST)), 0.05)


def pale(picture: np.ndarray, white: float) -> np.ndarray:
    """The picture grey and dimmed towards white, `(h, w, 3)`."""
    return (0.46 + 0.48 * (luminance(picture) / white).clip(0, 1))[..., None].repeat(3, axis=2)


def tinted(picture: np.ndarray, scores: np.ndarray, limit: float, white: float = 1.0) -> np.ndarray:
    """The pale picture, coloured by the scores of its pixels; NaN stays without colour."""
    part = (np.where(np.isfinite(scores), scores, 0).astype(np.float32) / limit).clip(-1, 1)
    strength = (0.86 * np.abs(part) ** 0.6)[..., None]
    return (1 - strength) * pale(picture, white) + strength * colours()((part + 1) / 2)[..., :3].astype(np.float32)


def stretched_rgb(picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The picture with one pixel per score, where there are more scores than pixels."""
    return np.stack([stretched(picture[..., c], shape[0], shape[1]) for c in range(3)], axis=2)


def add_scale(axes: Axes, limit: float, scores: np.ndarray, class_name: str) -> None:
    """The colour bar, with what a score means."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    beyond = bool((np.abs(scores[np.isfinite(scores)]) > limit).any())
    # scores fall with the number of tokens: a power of ten in the label, not beside the ticks
    power = min(0, int(np.floor(np.log10(limit)))) if limit < 1e-2 else 0
    unit = f", in units of 1e{power}" if power else ""
    scale = ScalarMappable(Normalize(-limit / 10.0**power, limit / 10.0**power), colours())
    bar = Colorbar(axes, scale, orientation="horizontal", extend="both" if beyond else "neither")
    bar.locator = MaxNLocator(5)
    axes.grid(False)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    name = textwrap.shorten(class_name, 40, placeholder="...")
    meaning = f"change of the log-odds of '{name}' if the patch were removed, sign reversed{unit}: "
    lines = textwrap.wrap(meaning, 50)
    bar.set_label("\n".join([*lines, "positive = speaks for it"]), fontsize=8, color=MUTED)
    axes.tick_params(labelsize=8)


def draw_truth(axes: Axes, picture: np.ndarray, truth: np.ndarray, names: Mapping[int, str]) -> None:
    """The pale picture with the marked regions in colour, one colour per value."""
    from matplotlib.patches import Patch

    check_grid(truth)
    values = [int(v) for v in np.unique(truth) if v]
    grid = max(truth.shape) > min(picture.shape[:2])
    rows, columns = fitted(truth.shape[0], truth.shape[1], LONGEST) if grid else picture.shape[:2]
    base = picture if (rows, columns) == picture.shape[:2] else stretched_rgb(picture, (rows, columns))
    shown = pale(base, brightest(picture))
    handles = []
    for n, value in enumerate(values):
        colour = np.array(hex_rgb(COLOURS[(n + 1) % len(COLOURS)]), np.float32)
        covered = 0.75 * stretched((truth == value).astype(np.float32), rows, columns)[..., None]
        shown = (1 - covered) * shown + covered * colour
        handles.append(Patch(color=tuple(colour), label=names.get(value, str(value))))
    axes.imshow(shown, interpolation="antialiased", aspect="auto")
    share = float((np.asarray(truth) != 0).mean())
    axes.set_title(f"Truth, {100 * share:.3g} % of the area" if values else "Truth: nothing marked")
    if len(values) > 1 or names:
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3, fontsize=8)


def hex_rgb(colour: str) -> tuple[float, ...]:
    """'#rrggbb' as three numbers from 0 to 1."""
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
