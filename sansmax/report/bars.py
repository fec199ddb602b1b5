"""Several models side by side: a score of each, with its interval."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sansmax.errors import InputError
from sansmax.report.resample import Interval
from sansmax.report.style import COLOURS, INK, MUTED, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUP_GAP = 0.9


def bars(
    groups: Mapping[str, Mapping[str, Interval]],
    path: str | Path,
    *,
    chance: float | None = None,
    title: str = "",
    note: str = "",
    label: str = "accuracy",
    percent: bool = True,
) -> Path:
    """One bar per model of `{group: {model: Interval}}`, with its interval and numbers; chance as a dashed line.

    A group is a data set or a task, with one it may be named "". The first model of a group is the one the picture
    is about and has the full colour. `label` is what is measured.
    """
    with look():
        return save(bars_figure(groups, chance, title, note, label, percent), path)


def bars_figure(
    groups: Mapping[str, Mapping[str, Interval]],
    chance: float | None = None,
    title: str = "",
    note: str = "",
    label: str = "accuracy",
    percent: bool = True,
) -> Figure:
    """The figure of `bars`."""
    count = sum(map(len, groups.values()))
    if not count:
        raise InputError("bars needs at least one model: {group: {model: Interval}}")
    headings = sum(bool(name) for name in groups)
    height = 0.36 * count + 0.36 * (GROUP_GAP * headings + GROUP_GAP / 3 * (len(groups) - 1)) + 1.7
    figure = new_figure(8.2, height, title or finding(groups, label, percent), note or "lines: 95 % interval")
    axes = figure.subplots()
    names = list(dict.fromkeys(model for models in groups.values() for model in models))
    top, places, shown = 0.0, [], []
    for group, models in groups.items():
        if group:
            place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "zorder": 5}
            axes.text(0, top, group, fontweight="bold", fontsize=9.5, backgroundcolor="white", **place)
            top += GROUP_GAP
        for model, interval in models.items():
            draw_bar(axes, top, interval, names.index(model), percent)
            places.append(top)
            shown.append(textwrap.fill(textwrap.shorten(model, 56, placeholder="..."), 30))
            top += 1
        top += GROUP_GAP / 3
    axes.set_yticks(places, shown, color=INK, fontsize=9)
    axes.set_ylim(top - GROUP_GAP / 3 - 0.4, -0.6)
    finish(axes, groups, chance, label, percent)
    return figure


def draw_bar(axes: Axes, place: float, interval: Interval, rank: int, percent: bool) -> None:
    """A bar, its interval, and the numbers at its right; "not defined" where it is so."""
    if np.isnan(interval.value):
        axes.annotate("not defined", (0, place), xytext=(6, 0), textcoords="offset points", va="center", color=MUTED)
        return
    colour = COLOURS[0] if rank == 0 else "#a9c6dc"
    axes.barh(place, interval.value, height=0.66, color=colour, linewidth=0)
    right = interval.value
    if not np.isnan(interval.low):
        axes.plot([interval.low, interval.high], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt")
        right = max(right, interval.high)
    axes.annotate(
        short_text(interval, percent),
        (right, place),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.8,
        fontweight="bold" if rank == 0 else "normal",
        annotation_clip=False,
    )


def short_text(interval: Interval, percent: bool) -> str:
    """The value and its bounds as the picture says them."""
    scale, form, unit = (100, ".1f", " %") if percent else (1, ".3f", "")
    text = f"{scale * interval.value:{form}}{unit}"
    if np.isnan(interval.low):
        return text
    return f"{text} ({scale * interval.low:{form}} to {scale * interval.high:{form}})"


def finish(
    axes: Axes, groups: Mapping[str, Mapping[str, Interval]], chance: float | None, label: str, percent: bool
) -> None:
    """Axis from zero, room for the numbers, chance as a dashed line."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    values = [v for models in groups.values() for i in models.values() for v in (i.value, i.high) if not np.isnan(v)]
    longest = max([*values, chance or 0.0, 1e-9])
    full = 1.0 if longest <= 1 and longest > 0.3 else longest
    axes.set_xlim(0, 1.42 * longest if longest < 0.7 * full else full * 1.36)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ticks = [t for t in axes.get_xticks() if t <= max(full, longest) + 1e-9]
    axes.set_xticks(ticks)
    if percent:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}"))
    axes.set_xlabel(f"{label} (%)" if percent else label)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if chance is not None:
        axes.axvline(chance, color=INK, linestyle=(0, (4, 3)), linewidth=1.1)
        text = f"chance {100 * chance:.3g} %" if percent else f"chance {chance:.3g}"
        place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate(text, (chance, 1), xytext=(0, 3), ha="center", fontsize=8.2, **place)


def finding(groups: Mapping[str, Mapping[str, Interval]], label: str, percent: bool) -> str:
    """The first model's value, in words."""
    model, interval = next((m, i) for models in groups.values() for m, i in models.items())
    if np.isnan(interval.value):
        return f"{label.capitalize()} of {len(next(iter(groups.values())))} models"
    value = f"{100 * interval.value:.1f} %" if percent else f"{interval.value:.3f}"
    return f"{textwrap.shorten(model, 40, placeholder='...')}: {label} {value}"
