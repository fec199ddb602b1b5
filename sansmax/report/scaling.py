"""Time and memory against the number of tokens: what linear attention is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sansmax.errors import InputError
from sansmax.report.curves import column
from sansmax.report.labels import LETTER, SIZE, Label, place_labels
from sansmax.report.style import COLOURS, MUTED, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOFTMAX_COLOURS = ("#cc3311", "#e8836b", "#7a1f0a")
# for the eighth line and on
MORE_COLOURS = ("#2e6f40", "#a0522d", "#1b2a6b")
Lines = dict[str, tuple[np.ndarray, np.ndarray]]
# width of a panel in points
PANEL = 310
# lines whose names, growth and reasons find a place each
MOST_IN_FULL = 5
QUANTITIES = (("seconds", "Time of one forward pass"), ("peak_mib", "Peak memory"))


def scaling(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str = "",
    note: str = "",
    limit: str = "",
    heading: str = QUANTITIES[0][1],
) -> Path:
    """Seconds and peak memory of each mechanism over the number of tokens, both axes logarithmic.

    `rows` hold `mechanism`, `tokens`, `image_px` (side of the square image, may be missing), `seconds`, `peak_mib`,
    and `reason`: why a mechanism stopped at this number of tokens (its `seconds` may then be empty), else None. The
    title, where none is given, compares the fastest mechanism with softmax at the largest size both reached. `limit`
    names the one that is no mechanism but what none can undercut; `heading` says what the seconds are of.
    """
    with look():
        return save(scaling_figure(rows, title, note, limit, heading), path)


def scaling_figure(
    rows: Sequence[Mapping[str, Any]],
    title: str = "",
    note: str = "",
    limit: str = "",
    heading: str = QUANTITIES[0][1],
) -> Figure:
    """The figure of `scaling`."""
    names = list(dict.fromkeys(str(row["mechanism"]) for row in rows))
    if not names:
        raise InputError("there are no rows to draw the scaling from; measure at least one mechanism")
    colours = mechanism_colours([name for name in names if name != limit]) | {limit: MUTED}
    found = title or finding([row for row in rows if row["mechanism"] != limit], [n for n in names if n != limit])
    brief = len(names) > MOST_IN_FULL
    stopped = "crosses: where a mechanism stopped" + ("" if brief else ", and why")
    crosses = stopped if any(row.get("reason") for row in rows) else ""
    if brief:
        powers = "numbers: power of the number of tokens by which it grows"
        note = "\n".join(part for part in (note, powers) if part)
    figure = new_figure(10.5, 6.4 if brief else 5.3, found, "; ".join(part for part in (note, crosses) if part))
    panels, words = figure.subplots(1, 2), []
    for axes, (quantity, of) in zip(panels, ((QUANTITIES[0][0], heading), QUANTITIES[1]), strict=True):
        measured = {name: line_of(rows, name, quantity) for name in names}
        measured = {name: (x, y) for name, (x, y) in measured.items() if len(x)}
        axes.set(xscale="log", yscale="log")
        axes.set_title(of, pad=32 if any(row.get("image_px") for row in rows) else 8)
        frame(axes, rows, measured, quantity, brief)
        image_sides(axes, rows)
        words.append(guides(axes, measured))
        for name, (x, y) in measured.items():
            style = "o--" if name == limit else "o-"
            axes.plot(x, y, style, color=colours[name], markersize=4.5, markeredgecolor="white", markeredgewidth=0.6)
    # placing texts needs the final sizes of both panels
    for axes, (quantity, _), guide_names in zip(panels, QUANTITIES, words, strict=True):
        ends = end_labels(axes, rows, {name: line_of(rows, name, quantity) for name in names}, colours, brief)
        place_labels(axes, ends + guide_names)
    return figure


def mechanism_colours(names: Sequence[str]) -> dict[str, str]:
    """Softmax and its variants are always red; the others take the palette in their order."""
    reds, others = cycle(SOFTMAX_COLOURS), cycle((*(c for c in COLOURS if c != COLOURS[3]), *MORE_COLOURS))
    return {name: next(reds) if is_softmax(name) else next(others) for name in names}


def is_softmax(name: str) -> bool:
    """Whether this is the mechanism the others are compared with."""
    return name.lower().startswith("softmax")


def line_of(rows: Sequence[Mapping[str, Any]], name: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and quantity of one mechanism where it was measured, by tokens."""
    own = [row for row in rows if str(row["mechanism"]) == name]
    x, y = column(own, "tokens"), column(own, quantity)
    there = np.isfinite(y) & (y > 0)
    order = np.argsort(x[there])
    return x[there][order], y[there][order]


def finding(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """What the numbers say, in one sentence."""
    reach = {name: line for name in names if len((line := line_of(rows, name, "seconds"))[0])}
    # against the variant of softmax that gets farthest
    softmax = max((n for n in reach if is_softmax(n)), key=lambda n: reach[n][0].max(), default="")
    others = [n for n in reach if not is_softmax(n)]
    shared = [x for n in others for x in reach[n][0] if softmax and x in reach[softmax][0]]
    if not shared:
        return "Cost against the number of tokens"
    tokens = max(shared)
    seconds = {n: at(reach[n], tokens) for n in others if tokens in reach[n][0]}
    best = min(seconds, key=lambda n: seconds[n])
    sentence = (
        f"At {tokens:,.0f} tokens {best} is {times(at(reach[softmax], tokens) / seconds[best])} as fast as {softmax}"
    )
    memory = [line_of(rows, n, "peak_mib") for n in (softmax, best)]
    if all(tokens in x for x, _ in memory) and (ratio := at(memory[0], tokens) / at(memory[1], tokens)) >= 1.5:
        sentence += f"\nand needs {times(ratio)} less memory"
    farthest = max([best, *others], key=lambda n: reach[n][0].max())
    if (most := reach[farthest][0].max()) > reach[softmax][0].max():
        who = "it" if farthest == best else farthest
        sentence += f"{'; ' if chr(10) in sentence else chr(10) + 'and '}{who} goes on to {most:,.0f} tokens"
    return sentence


def at(line: tuple[np.ndarray, np.ndarray], tokens: float) -> float:
    """The value measured at exactly `tokens`."""
    return float(line[1][line[0] == tokens][0])


def times(ratio: float) -> str:
    """A factor with two digits: "41 times", "1.3 times"."""
    return f"{ratio:.0f} times" if ratio >= 9.95 else f"{ratio:.1f} times"


def frame(axes: Axes, rows: Sequence[Mapping[str, Any]], measured: Lines, quantity: str, brief: bool = False) -> None:
    """Limits with room for names at the right, and ticks in units people use."""
    x = np.unique(column(rows, "tokens"))
    y = np.concatenate([np.array([1.0]) if not measured else np.empty(0), *(y for _, y in measured.values())])
    span = max(x.max() / x.min(), 10.0)
    # the names of the lines that reach the end stand at their right
    more = len(" 1.00") if brief else 0
    letters = max([len(name) + more for name, (own, _) in measured.items() if own[-1] == x.max()] + [len("slope 1.00")])
    part = min(0.45, (14 + LETTER * SIZE * letters) / PANEL)
    axes.set_xlim(x.min() / span**0.04, x.max() * span ** (1.04 * part / (1 - part)))
    axes.set_ylim(y.min() / 2.2, y.max() * 4)
    keep = x if len(x) <= 6 else x[:: -(-len(x) // 6)]
    axes.set_xticks(keep, [compact(v) for v in keep])
    ticks = time_ticks(*axes.get_ylim()) if quantity == "seconds" else memory_ticks(*axes.get_ylim())
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def time_ticks(low: float, high: float) -> dict[float, str]:
    """Powers of ten of a second, minutes from 60 s on; 1, 2, 5 between where the range is short."""
    steps = (1,) if high / low > 300 else (1, 2, 5)
    seconds = [m * 10.0**e for e in range(-9, 2) for m in steps] + [60, 600, 6_000, 60_000, 600_000]
    return {s: time_text(s) for s in seconds if low <= s <= high and (s < 60 or s % 60 == 0)}


def time_text(seconds: float) -> str:
    """A time with the unit that suits it."""
    for size, unit in ((60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        if seconds >= 0.999 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.1g} s"


def memory_ticks(low: float, high: float) -> dict[float, str]:
    """Powers of two of a MiB, about five of them."""
    factor = 2 ** max(1, round(np.log2(high / low) / 5))
    first = np.ceil(np.log2(low) / np.log2(factor))
    sizes = [float(factor ** (first + i)) for i in range(12)]
    return {size: memory_text(size) for size in sizes if size <= high}


def memory_text(mib: float) -> str:
    """A size with the unit that suits it."""
    for size, unit in ((2**20, "TiB"), (1024, "GiB"), (1, "MiB"), (1 / 1024, "KiB")):
        if mib >= size:
            return f"{mib / size:g} {unit}"
    return f"{mib * 2**20:g} B"


def compact(tokens: float) -> str:
    """4,096 as it is; 65,536 as 66k; 1,048,576 as 1.05M."""
    if tokens < 10_000:
        return f"{tokens:,.0f}"
    return f"{tokens / 1e3:.0f}k" if tokens < 1e6 else f"{tokens / 1e6:.3g}M"


def guides(axes: Axes, measured: Lines) -> list[Label]:
    """Dotted lines of linear and quadratic growth from the lower left corner; returns their names, to be placed."""
    words: list[Label] = []
    if not measured:
        return words
    left, right = (f(f(x) for x, _ in measured.values()) for f in (min, max))
    low, high = axes.get_ylim()
    for power, word in ((1, "linear"), (2, "quadratic")):
        x = np.geomspace(left, right, 200)
        y = 1.35 * low * (x / left) ** power
        inside = y < high
        if right > left and inside.sum() > 1:
            axes.plot(x[inside], y[inside], ":", color="#a8b2bc", linewidth=1.3, zorder=1)
            end = np.flatnonzero(inside)[int(0.9 * inside.sum())]
            words.append(Label(float(x[end]), float(y[end]), word, "#7d8996", bold=False))
    return words


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Exponent of the growth over the larger half of the sizes; NaN from fewer than two."""
    half = x >= np.sqrt(x.min() * x.max())
    if half.sum() < 2:
        half = np.ones(len(x), bool)
    return float(np.polyfit(np.log(x[half]), np.log(y[half]), 1)[0]) if half.sum() > 1 else float("nan")


def end_labels(
    axes: Axes, rows: Sequence[Mapping[str, Any]], measured: Lines, colours: Mapping[str, str], brief: bool = False
) -> list[Label]:
    """The name of each line with its growth; a cross and the reason where it stopped. The lowest end comes first.

    `brief` has one line each, without the reason: what there is room for beside many lines.
    """
    labels = []
    for name, (x, y) in measured.items():
        if not len(x):
            continue
        power = slope(x, y)
        facts = [] if np.isnan(power) else [f"{power:.2f}" if brief else f"slope {power:.2f}"]
        stops = [str(row["reason"]) for row in rows if str(row["mechanism"]) == name and row.get("reason")]
        if stops:
            axes.plot(x[-1], y[-1], "X", color=colours[name], markersize=9, markeredgecolor="white", zorder=6)
            facts += [] if brief else stops[:1]
        text = (" " if brief else "\n").join([name, *facts])
        labels.append(Label(float(x[-1]), float(y[-1]), text, colours[name]))
    return sorted(labels, key=lambda label: label.y)


def image_sides(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The side of the square image in pixels, above the ticks of the tokens."""
    sides = {float(row["tokens"]): row["image_px"] for row in rows if row.get("image_px")}
    shown = [t for t in axes.get_xticks() if t in sides]
    if shown:
        top = axes.secondary_xaxis("top")
        top.set_xticks(shown, [f"{int(sides[t]):,}" for t in shown])
        top.minorticks_off()
        top.tick_params(length=2, labelsize=8)
        top.spines[:].set_visible(False)
        top.set_xlabel("side of the image (px)", fontsize=8.2, color=MUTED, loc="left")
