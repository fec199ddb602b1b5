"""The page and the picture of `benchmarks.accuracy`: medians over seeds, and how far each arm is from softmax."""

import statistics
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import do_it_again
from sansmax.report.resample import Interval, draw_weights, percentile_interval
from sansmax.report.scaling import mechanism_colours
from sansmax.report.scores import class_rankings, mean_defined
from sansmax.report.style import look, new_figure, save
from sansmax.report.summary import interval_text, table, write_summary
from sansmax.report.tables import read_rows

Row = dict[str, Any]
Predictions = Callable[[Path], tuple[np.ndarray, np.ndarray]]
# AUC and accuracy of ResNet-18 on pictures of 28 px, https://arxiv.org/abs/2110.14795
PUBLISHED = {"pneumoniamnist": (0.944, 0.854), "breastmnist": (0.901, 0.863), "retinamnist": (0.717, 0.524)}
GROWING = {
    "idrid": "Fundus photographs, referable retinopathy",
    "chest": "Chest X-rays of 28 px, enlarged",
}
BITS = {"32": "float32", "bf16": "bfloat16"}
# what this line and all below it hold is written by hand and stays
NOTE = "## What falls short, and what was tried"
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.accuracy --medmnist FOLDER --idrid FOLDER"
RESAMPLES = 1000
HOW = (
    "Medians over the seeds. The difference is that of the mean AUC over the seeds from softmax's, in points "
    "(hundredths of AUC); brackets: 95 % interval over resamples of the test images, the same ones for both. It tells "
    "how much another test set would vary; how much another training would is in the table of each seed."
)


def auc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC for each column of weights: of two classes that of the second, of more the mean one against the rest."""
    areas = class_rankings(weights, labels, probabilities)["auc"]
    return areas[-1] if len(areas) == 2 else mean_defined(areas)


def mean_auc(folders: Sequence[Path], predictions: Predictions) -> np.ndarray:
    """The AUC of each resample of the test images, averaged over runs; the first one is of the images as they are."""
    labels, _ = predictions(folders[0])
    drawn = next(draw_weights(np.arange(len(labels)), RESAMPLES, 0, RESAMPLES))
    weights = np.concatenate([np.ones((len(labels), 1)), drawn], axis=1)
    return np.mean([auc(*predictions(folder), weights) for folder in folders], axis=0)


def difference(rows: list[Row], attention: str, predictions: Predictions) -> Interval | None:
    """How many points of AUC an arm is above softmax, over the seeds that both have."""
    seeds = {a: {r["seed"]: Path(r["run"]) for r in rows if r["attention"] == a} for a in (attention, "softmax")}
    shared = sorted(set(seeds[attention]) & set(seeds["softmax"]))
    if attention == "softmax" or not shared:
        return None
    own, other = (mean_auc([seeds[a][s] for s in shared], predictions) for a in (attention, "softmax"))
    images = len(predictions(seeds[attention][shared[0]])[0])
    return percentile_interval(100 * (own - other), images)


def lines_of(rows: list[Row], predictions: Predictions) -> list[list[Any]]:
    """A line per attention of one set at one size."""
    lines = []
    for attention in dict.fromkeys(r["attention"] for r in rows):
        own = [r for r in rows if r["attention"] == attention]
        area, accuracy, seconds = (statistics.median(r[key] for r in own) for key in ("auc", "accuracy", "seconds"))
        gap = difference(rows, attention, predictions)
        gap_text = "" if gap is None else f"{gap.value:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})"
        lines.append([attention, f"{area:.3f}", f"{accuracy:.3f}", gap_text, f"{seconds:.0f} s", len(own)])
    return lines


def small_sets(rows: list[Row], predictions: Predictions) -> str:
    """The table of the MedMNIST sets, with the published ResNet-18."""
    lines = []
    for name, (area, accuracy) in PUBLISHED.items():
        own = [r for r in rows if r["study"] == name]
        lines += [[name, *line] for line in lines_of(own, predictions)] if own else []
        lines += [[name, "ResNet-18, published", f"{area:.3f}", f"{accuracy:.3f}", "", "", ""]] if own else []
    if not lines:
        return ""
    return table(["set", "attention", "AUC", "accuracy", "points from softmax", "training", "seeds"], lines)


def growing(rows: list[Row], study: str, predictions: Predictions) -> str:
    """The table of one set at growing size."""
    lines = []
    for size in sorted({r["image_size"] for r in rows if r["study"] == study}):
        own = [r for r in rows if r["study"] == study and r["image_size"] == size]
        lines += [[f"{size} px", *line] for line in lines_of(own, predictions)]
    if not lines:
        return ""
    return table(["size", "attention", "AUC", "accuracy", "points from softmax", "training", "seeds"], lines)


def cost_table(cost: list[Row]) -> str:
    """Seconds and memory of an epoch, and how many times as long softmax takes."""
    alike = itemgetter("image_size", "patch_size", "precision")
    softmax = {alike(r): r for r in cost if r["attention"] == "softmax"}
    lines = [
        [
            f"{r['image_size']} px",
            f"{r['patch_size']} px",
            r["tokens"],
            BITS[str(r["precision"])],
            r["attention"],
            f"{r['epoch_seconds']:.1f} s",
            f"{softmax[alike(r)]['epoch_seconds'] / r['epoch_seconds']:.1f}",
            f"{r['peak_mib']:.0f} MiB",
        ]
        for r in cost
    ]
    names = ["size", "patch", "tokens", "precision", "attention", "an epoch", "softmax takes, times", "peak memory"]
    return table(names, lines)


def write_page(folder: Path, rows: list[Row], predictions: Predictions, environment: dict[str, Any]) -> str:
    """Writes accuracy.md and accuracy.png, and gives the tables; what was written by hand stays."""
    path = folder / "accuracy.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    note = old[old.index(NOTE) :].split("\n", 1)[-1] if NOTE in old else ""
    cost = read_rows(folder / "accuracy_cost.csv") if (folder / "accuracy_cost.csv").exists() else []
    sections = [("MedMNIST, 28 px", small_sets(rows, predictions))]
    sections += [(title, growing(rows, study, predictions)) for study, title in GROWING.items()]
    sections = [(title, f"{text}\n\n{HOW}") for title, text in sections if text]
    if draw(folder / "accuracy.png", rows, cost):
        sections.append(("", "![AUC and cost by the size of the picture](accuracy.png)"))
    if cost:
        again = "`python -m benchmarks.accuracy_cost --idrid FOLDER`, fundus photographs, steps of 8 images"
        sections.append(("What an epoch costs", f"{cost_table(cost)}\n\n{again}, {cost[0]['threads']} threads."))
    every = [
        [r["study"], r["image_size"], r["attention"], r["seed"], *(_interval(r, s) for s in ("auc", "accuracy"))]
        for r in rows
    ]
    sections += [
        ("Each seed", table(["set", "px", "attention", "seed", "test AUC", "test accuracy"], every)),
        ("Do it again", do_it_again("benchmarks.accuracy", environment, COMMAND)),
        (NOTE.removeprefix("## "), note),
    ]
    write_summary(path, "Four attentions, trained alike", sections)
    return "\n\n".join(text for title, text in sections[:3])


def _interval(row: Row, score: str) -> str:
    return interval_text(Interval(row[score], row[f"{score}_low"], row[f"{score}_high"]), percent=False)


def draw(path: Path, rows: list[Row], cost: list[Row]) -> bool:
    """AUC of the growing sets by size, and time and memory of an epoch; False where there is nothing to draw."""
    studies = [s for s in GROWING if any(r["study"] == s for r in rows)]
    panels = [*studies, *(("epoch_seconds", "peak_mib") if cost else ())]
    if not panels:
        return False
    arms = list(dict.fromkeys(r["attention"] for r in rows))
    colours = mechanism_colours(arms)

    def drawn(r: Row) -> tuple[Any, ...]:
        return r["attention"], r["patch_size"], str(r["precision"])

    with look():
        title = "The same training, four attentions, pictures of growing size"
        note = "AUC: median of the seeds, shaded from the lowest to the highest; costs: median of steps in turn"
        figure = new_figure(4.0 * len(panels), 4.2, title, note)
        every = np.atleast_1d(figure.subplots(1, len(panels)))
        for axes, panel in zip(every, panels, strict=True):
            for attention in arms:
                if panel in GROWING:
                    _auc_line(axes, [r for r in rows if (r["study"], r["attention"]) == (panel, attention)], colours)
                else:
                    own = [r for r in cost if drawn(r) == (attention, 16, "32")]
                    axes.plot([r["image_size"] for r in own], [r[panel] for r in own], "o-", color=colours[attention])
            _frame(axes, panel, sorted({r["image_size"] for r in [*rows, *cost] if r["image_size"] > 28}))
        handles = [every[0].plot([], [], "o-", color=colours[a], label=a)[0] for a in arms]
        every[0].legend(handles=handles, loc="best")
        save(figure, path)
    return True


def _auc_line(axes: Any, rows: list[Row], colours: dict[str, str]) -> None:
    if not rows:
        return
    by_size: dict[int, list[float]] = {}
    for r in rows:
        by_size.setdefault(r["image_size"], []).append(r["auc"])
    sizes = sorted(by_size)
    colour = colours[rows[0]["attention"]]
    axes.plot(sizes, [statistics.median(by_size[s]) for s in sizes], "o-", color=colour)
    axes.fill_between(
        sizes, [min(by_size[s]) for s in sizes], [max(by_size[s]) for s in sizes], color=colour, alpha=0.12, lw=0
    )


def _frame(axes: Any, panel: str, sizes: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(s) for s in sizes])
    axes.minorticks_off()
    axes.set_xlabel("side of the picture in pixels")
    if panel in GROWING:
        axes.set_title(GROWING[panel])
        axes.set_ylabel("test AUC")
        # from chance on: what differs by less than seeds do should not look large
        axes.set_ylim(0.5, 0.8 if axes.get_ylim()[1] < 0.8 else 1.0)
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title({"epoch_seconds": "Seconds of an epoch", "peak_mib": "Peak memory in MiB"}[panel])
