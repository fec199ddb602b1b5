"""Scores of a slide's tokens over its thumbnail, with scale bar and legend; or over white, from a stored bag alone."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sansmax.errors import InputError
from sansmax.report.heatmap import brightest, colours, robust_limit, tinted
from sansmax.report.pictures import area_mean, as_rgb, fitted
from sansmax.report.score_raster import ScoreRaster
from sansmax.report.slide_scores import SlideScores
from sansmax.report.style import INK, MUTED, bare, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONGEST = 1400
# inches of a figure's parts
EDGE, GAP, HEAD, FOOT = 0.12, 0.3, 0.32, 1.1


class Window(NamedTuple):
    """What is drawn, in level-0 pixels: left, upper edge, width and height."""

    left: float
    top: float
    width: float
    height: float


def slide_heatmap(
    scores: SlideScores, path: str | Path, thumbnail: np.ndarray | None = None, *, title: str = "", note: str = ""
) -> Path:
    """PNG of the whole slide and, beside it, the signed scores over it, with a scale bar and what a score means.

    `thumbnail` `(h, w, 3)` covers the whole slide, at any size. Without it the scores lie over white, with the outline
    of the tokens. Each pixel shows the exact mean of the scores that it covers. The scale bar needs `mpp`, else it
    counts level-0 pixels.

    Raises InputError for scores without coordinates, and for a thumbnail of other proportions than the slide.
    """
    with look():
        return save(slide_figure(scores, thumbnail, title, note), path)


def slide_figure(scores: SlideScores, thumbnail: np.ndarray | None = None, title: str = "", note: str = "") -> Figure:
    """The figure of `slide_heatmap`."""
    window = drawn_window(scores, thumbnail)
    rows, columns = fitted(math.ceil(window.height), math.ceil(window.width), LONGEST)
    if max(rows, columns) < LONGEST:
        # few level-0 pixels are drawn larger, so that tokens have sharp edges
        factor = LONGEST / max(rows, columns)
        rows, columns = max(1, round(rows * factor)), max(1, round(columns * factor))
    assert scores.xy is not None and scores.side is not None
    origin = (window.left, window.top)
    downsample = window.width / columns
    raster = ScoreRaster(
        scores.xy, scores.scores, scores.side, downsample=downsample, size=(columns, rows), origin=origin
    )
    mean, share = raster.whole()
    limit = robust_limit(mean)
    count = 1 if thumbnail is None else 2
    figure, panels, bar = _panels(window, count, title or default_title(scores), note or default_note(scores))
    if thumbnail is not None:
        picture = resized(as_rgb(thumbnail), rows, columns)
        panels[0].imshow(picture, interpolation="antialiased", aspect="auto")
        panels[0].set_title("Slide")
        shown = tinted(picture, np.where(share > 0, mean * share, np.nan), limit, brightest(picture))
    else:
        shown = over_white(mean, share, limit)
    panels[-1].imshow(shown, interpolation="antialiased", aspect="auto")
    panels[-1].set_title(f"Scores of {scores.scores.size:,} tokens")
    for panel in panels:
        scale_bar(panel, (rows, columns), downsample, scores.mpp)
    _legend(bar, limit, mean, scores)
    return figure


def default_title(scores: SlideScores) -> str:
    """Slide, class and probability."""
    share = "" if scores.probability is None else f" ({100 * scores.probability:.1f} %)"
    return f"{textwrap.shorten(scores.slide_id, 44, placeholder='...')}: {scores.class_name}{share}"


def default_note(scores: SlideScores) -> str:
    """Method, and how large a token is."""
    size = "" if scores.side is None else f"tokens of {scores.side:,.0f} level-0 px"
    if scores.mpp is not None and scores.side is not None:
        size = f"tokens of {scores.side * scores.mpp:,.4g} \N{MICRO SIGN}m"
    return f"{scores.method}, {size}" if size else scores.method


def drawn_window(scores: SlideScores, thumbnail: np.ndarray | None) -> Window:
    """The whole slide where its size is known, else the tokens with a margin."""
    if scores.xy is None or scores.side is None:
        raise InputError(
            f"{scores.slide_id}: the tokens have no coordinates, so there is no picture; write the array (h5), or make "
            "a bag with coordinates"
        )
    if scores.slide_size is not None:
        if thumbnail is not None:
            check_proportion(thumbnail, scores.slide_size, scores.slide_id)
        return Window(0, 0, *scores.slide_size)
    if thumbnail is not None:
        raise InputError(
            f"{scores.slide_id}: a thumbnail needs the size of the slide in level-0 pixels, which the bag does not "
            "hold; give the slide itself"
        )
    (left, top), (right, lower) = scores.xy.min(axis=0), scores.xy.max(axis=0) + scores.side
    margin = 0.03 * max(right - left, lower - top)
    return Window(left - margin, top - margin, right - left + 2 * margin, lower - top + 2 * margin)


def check_proportion(thumbnail: np.ndarray, slide_size: tuple[int, int], name: str) -> None:
    """Raises InputError where a thumbnail cannot be of this slide: its sides differ by more than a pixel's rounding."""
    height, width = thumbnail.shape[:2]
    expected = slide_size[1] * width / slide_size[0]
    # each side may be rounded or cut by a pixel
    if abs(height - expected) > 2 + expected / width:
        raise InputError(
            f"{name}: the thumbnail of {width} x {height} px does not show the slide of {slide_size[0]:,} x "
            f"{slide_size[1]:,} px, which would be {width} x {expected:.0f}; give a picture of the whole slide"
        )


def resized(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """RGB `(rows, columns, 3)`: area means where it shrinks, linear between pixels where it grows."""
    small = area_mean(picture, rows, columns)
    for axis, size in enumerate((rows, columns)):
        have = small.shape[axis]
        if have == size:
            continue
        at = ((np.arange(size) + 0.5) * have / size - 0.5).clip(0, have - 1)
        low = np.floor(at).astype(np.int64)
        high = np.minimum(low + 1, have - 1)
        part = (at - low).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(3)])
        small = (1 - part) * small.take(low, axis) + part * small.take(high, axis)
    return small


def over_white(mean: np.ndarray, share: np.ndarray, limit: float) -> np.ndarray:
    """Coloured scores over white, RGB from 0 to 1; where tokens are it is light grey, with a grey outline."""
    part = (np.where(share > 0, mean, 0) / limit).clip(-1, 1)
    strength = (share * np.where(share > 0, 0.86 * np.abs(part) ** 0.6, 0))[..., None]
    ground = np.repeat(1 - 0.09 * share[..., None], 3, axis=2)
    shown = (1 - strength) * ground + strength * colours()((part + 1) / 2)[..., :3]
    inside = np.pad(share > 0.5, 1)
    core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    edge = inside[1:-1, 1:-1] & ~core
    shown[edge] = 0.35 * shown[edge] + 0.65 * 0.55
    return shown


def nice_length(most: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is at most `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return max(k * power for k in (1, 2, 5) if k * power <= most * (1 + 1e-9))


def length_text(micrometres: float) -> str:
    """A length in words: "2 mm", "500 um" with the sign for micro."""
    return f"{micrometres / 1000:g} mm" if micrometres >= 1000 else f"{micrometres:g} \N{MICRO SIGN}m"


def scale_bar(axes: Axes, shape: tuple[int, int], downsample: float, mpp: float | None) -> None:
    """A bar of about a fifth of the width in the lower left corner: in mm or um, or level-0 pixels without `mpp`."""
    rows, columns = shape
    unit = downsample * (mpp or 1.0)
    length = nice_length(0.25 * columns * unit)
    text = length_text(length) if mpp else f"{length:,g} px"
    wide, high = length / unit, max(3.0, 0.006 * max(rows, columns))
    left, lower = 0.02 * columns, rows - 0.02 * max(rows, columns)
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, lower - high), wide, high, facecolor=INK, edgecolor="white", linewidth=0.8))
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.2}
    axes.text(left, lower - 1.6 * high, text, ha="left", va="bottom", fontsize=8, color=INK, bbox=box)


def _panels(window: Window, count: int, title: str, note: str) -> tuple[Figure, list[Axes], Axes]:
    """A figure with `count` panels of the window's proportion, side by side or stacked, and room for a colour bar."""
    ratio = min(max(window.height / window.width, 0.08), 2.5)
    stacked = count > 1 and ratio < 0.5
    wide = (8.6 if ratio < 0.5 else 5.6) if count == 1 or stacked else 4.6 if ratio < 1.3 else 3.6
    high = wide * ratio
    heading = 0.12 + 0.25 * (title.count("\n") + 1) + 0.19 * (note.count("\n") + 1)
    across, down = (1, count) if stacked else (count, 1)
    width = 2 * EDGE + across * wide + (across - 1) * GAP
    height = heading + down * (HEAD + high) + (down - 1) * GAP / 2 + FOOT
    figure = new_figure(width, height, title, note)
    figure.set_layout_engine("none")
    panels = []
    for i in range(count):
        left = EDGE + (0 if stacked else i * (wide + GAP))
        bottom = height - heading - HEAD - high - (i * (HEAD + high + GAP / 2) if stacked else 0)
        axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
        bare(axes)
        panels.append(axes)
    left = EDGE + (0 if stacked else (count - 1) * (wide + GAP)) + 0.04 * wide
    return figure, panels, figure.add_axes((left / width, (FOOT - 0.27) / height, 0.92 * wide / width, 0.12 / height))


def _legend(axes: Axes, limit: float, mean: np.ndarray, scores: SlideScores) -> None:
    """The colour bar, with what a score means in words."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    beyond = bool((np.abs(mean[np.isfinite(mean)]) > limit).any())
    power = math.floor(math.log10(limit)) if limit < 1e-2 or limit >= 1e4 else 0
    scale = ScalarMappable(Normalize(-limit / 10.0**power, limit / 10.0**power), colours())
    bar = Colorbar(axes, scale, orientation="horizontal", extend="both" if beyond else "neither")
    bar.locator = MaxNLocator(5)
    axes.grid(False)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    unit = f" (in units of 1e{power})" if power else ""
    meaning = f"{scores.short_meaning}{unit}; red speaks for it, blue against it"
    bar.set_label("\n".join(textwrap.wrap(meaning, 62)), fontsize=8, color=MUTED)
    axes.tick_params(labelsize=8)
