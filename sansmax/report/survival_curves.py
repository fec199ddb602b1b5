"""Kaplan-Meier curves of the groups that predicted risks make, with the log-rank test between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sansmax.report.resample import Interval
from sansmax.report.roc import area_text
from sansmax.report.style import COLOURS, MUTED, look, new_figure, save
from sansmax.report.survival import kaplan_meier, log_rank, risk_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {2: ("low risk", "high risk"), 3: ("low risk", "middle", "high risk")}


def survival_curves(
    targets: np.ndarray,
    risks: np.ndarray,
    path: str | Path,
    *,
    folds: np.ndarray | None = None,
    groups: int = 2,
    c_index: Interval | None = None,
    unit: str = "time",
) -> Path:
    """The survival of `groups` equal groups by predicted risk, with 95 % bands, marks where cases are censored, and
    how many are at risk below; cut inside each fold, since risks of two networks have no common scale."""
    with look():
        return save(survival_figure(targets, risks, folds, groups, c_index, unit), path)


def survival_figure(
    targets: np.ndarray,
    risks: np.ndarray,
    folds: np.ndarray | None = None,
    groups: int = 2,
    c_index: Interval | None = None,
    unit: str = "time",
) -> Figure:
    """The figure of `survival_curves`."""
    from matplotlib.ticker import MaxNLocator

    which = risk_groups(risks, folds, groups)
    _, p = log_rank(targets, which, folds)
    title = f"Risk orders survival: c-index {area_text(c_index)}" if c_index else "Survival by predicted risk"
    subtitle = f"{len(risks):,} cases, {int(targets[:, 1].sum()):,} events; {p_text(p)}; bands: 95 %, ticks: censored"
    figure = new_figure(7.4, 5.6, title, subtitle)
    axes, below = figure.subplots(2, 1, height_ratios=(5, 0.35 * groups), sharex=True)
    names = NAMES.get(groups, tuple(f"group {g + 1}" for g in range(groups)))
    colours = (COLOURS[0], COLOURS[1]) if groups == 2 else (COLOURS[0], COLOURS[2], COLOURS[1], *COLOURS[3:])
    last = float(targets[:, 0].max())
    ends = [float(t) for t in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(0, last) if t <= 1.02 * last]
    for g in range(groups):
        own = targets[which == g]
        if not len(own):
            continue
        km, colour = kaplan_meier(own), colours[g % len(colours)]
        events = int(own[:, 1].sum())
        axes.step(km.times, km.survival, where="post", color=colour, label=f"{names[g]}: {events} of {len(own)}")
        axes.fill_between(km.times, km.low, km.high, step="post", color=colour, alpha=0.13, linewidth=0)
        censored = own[own[:, 1] == 0, 0]
        at = np.searchsorted(km.times, censored, side="right") - 1
        axes.plot(censored, km.survival[at], "|", color=colour, markersize=6, markeredgewidth=0.8)
        for t in ends:
            below.text(t, groups - 1 - g, str(int((own[:, 0] >= t).sum())), color=colour, ha="center", va="center")
    axes.set(ylim=(-0.02, 1.03), ylabel="share without event")
    axes.legend(loc="lower left", title="events", alignment="left")
    below.set(ylim=(-0.6, groups - 0.4), yticks=[], xticks=ends, xlabel=unit)
    below.tick_params(length=0)
    below.set_title("at risk", fontsize=8.5, color=MUTED, pad=2)
    below.grid(False)
    below.spines[:].set_visible(False)
    return figure


def p_text(p: float) -> str:
    """The p of the log-rank test in words."""
    if np.isnan(p):
        return "log-rank test not defined"
    return "log-rank p < 0.0001" if p < 1e-4 else f"log-rank p = {p:.4f}"
