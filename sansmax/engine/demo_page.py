"""The pictures and the page of the demo."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sansmax.data.mosaics import CELL, DigitMosaics, reduce
from sansmax.data.sets import LabelledImages
from sansmax.engine.build import num_parameters
from sansmax.engine.predict import NATIVE, Predictor
from sansmax.engine.progress import Reporter
from sansmax.engine.report_run import cost_of
from sansmax.engine.run import Run
from sansmax.report.bars import bars
from sansmax.report.confusion import confusion_matrix
from sansmax.report.grid import sample_grid
from sansmax.report.heatmap import heatmap
from sansmax.report.metrics import Metrics
from sansmax.report.resample import Interval
from sansmax.report.roc import roc_curves
from sansmax.report.scaling import scaling as draw_scaling
from sansmax.report.summary import interval_text, score_text, table, write_summary

if TYPE_CHECKING:
    from sansmax.engine.demo import Large, Plan

SHARE = 0.25
# cells along each side of the corner of the large picture that is drawn by itself
DETAIL = 24
SCORES = ("accuracy", "auc", "log_loss", "calibration_error")


def write_page(
    run: Run,
    data: LabelledImages,
    plan: "Plan",
    results: dict[str, np.ndarray],
    metrics: dict[str, Metrics],
    differences: dict[str, Interval],
    large: Sequence["Large"],
    scaling: list[dict[str, Any]],
    pointing: float,
    predictor: Predictor,
    reporter: Reporter,
) -> None:
    """Draws the demo's pictures into the run and writes its summary.md, which replaces that of the training."""
    folder = run.folder
    reporter.say("drawing pictures and writing summary.md")
    _draw_results(folder, data, results, metrics)
    _draw_examples(folder, data)
    _draw_heatmaps(folder, data, plan, run.config.seed, predictor)
    draw_scaling(scaling, folder / "scaling.png", note=run.info["environment"]["machine"])
    write_summary(
        folder / "summary.md",
        "Digit mosaics: the main job from end to end",
        [
            ("", _task(plan)),
            ("Results on digits never seen", _results(metrics, differences)),
            (f"Pictures of {CELL * plan.large_cells:,} px, without retraining", _large(large, plan, scaling)),
            ("What the network looks at", _looks(pointing, plan)),
            ("What softmax costs", _costs(scaling)),
            ("Training", _training(run, predictor)),
            ("Do it again", _again(run)),
        ],
    )


def _draw_results(
    folder: Path, data: LabelledImages, results: dict[str, np.ndarray], metrics: dict[str, Metrics]
) -> None:
    assert data.test is not None
    labels = data.test.labels
    first = next(iter(results))
    curves = {name: (labels, p) for name, p in results.items()}
    areas = {name: m["auc"] for name, m in metrics.items()}
    roc_curves(curves, data.classes, folder / "roc.png", intervals=areas)
    confusion_matrix(labels, results[first], data.classes, folder / "confusion.png")
    groups = {"": {name: m["accuracy"] for name, m in metrics.items()}}
    bars(groups, folder / "accuracy.png", chance=1 / len(data.classes), note=f"{len(labels):,} test pictures")


def _draw_examples(folder: Path, data: LabelledImages) -> None:
    images = data.test
    assert images is not None
    chosen = range(min(3, len(images)))
    pixels = [images.read(i) for i in chosen] + [reduce(images.read(i), 4) for i in chosen]
    titles = [f"most frequent: {data.classes[images.labels[i]]}" for i in chosen]
    titles += ["the same, reduced fourfold"] * len(chosen)
    sample_grid(pixels, titles, folder / "examples.png", columns=len(chosen), title="Digit mosaics")


def _draw_heatmaps(folder: Path, data: LabelledImages, plan: "Plan", seed: int, predictor: Predictor) -> None:
    small = data.test
    assert isinstance(small, DigitMosaics)
    i = 3 % len(small)
    label = int(small.labels[i])
    scores = predictor(small.read(i), scores=label).scores
    assert scores is not None
    _draw_heatmap(small.read(i), scores, small.truth(i) == label, label, folder / "heatmap.png")
    large = DigitMosaics("test", plan.large, grid=plan.large_cells, seed=seed)
    i = 3 % plan.large
    label, pixels, truth = int(large.labels[i]), large.read(i), large.truth(i) == int(large.labels[i])
    scores = predictor(pixels, image_size=NATIVE, scores=label, chunk_tokens=16384).scores
    assert scores is not None
    _draw_heatmap(pixels, scores, truth, label, folder / "heatmap_large.png")
    cells, px = slice(0, DETAIL), slice(0, DETAIL * CELL)
    where = f"the upper left corner of {pixels.shape[0]:,} x {pixels.shape[1]:,} px"
    detail = (pixels[px, px], scores[cells, cells], truth[cells, cells])
    _draw_heatmap(*detail, label, folder / "heatmap_detail.png", where)


def _draw_heatmap(
    pixels: np.ndarray, scores: np.ndarray, truth: np.ndarray, label: int, path: Path, where: str = ""
) -> None:
    heatmap(
        pixels,
        scores,
        path,
        truth,
        title=f"Which cells speak for {label}, and which are {label}",
        class_name=str(label),
        note=where,
        truth_names={1: f"cells that are {label}"},
    )


def _task(plan: "Plan") -> str:
    return (
        f"Each picture is a mosaic of handwritten digits, {CELL} x {CELL} px each. One digit fills {100 * SHARE:.0f} % "
        "of the cells, the nine others share the rest; the label is the frequent digit. Every patch of the network is "
        f"one cell, so the truth of every token is known. {plan.train:,} mosaics of 16 x 16 cells train it, "
        f"{plan.val:,} choose the epoch, {plan.test:,} measure it once; the scans of the digits in these three are "
        "different ones.\n\n"
        "![examples](examples.png)"
    )


def _results(metrics: dict[str, Metrics], differences: dict[str, Interval]) -> str:
    titles = {"accuracy": "accuracy", "auc": "AUC", "log_loss": "log loss", "calibration_error": "calibration error"}
    rows = [[name, *(score_text(s, m[s]) for s in SCORES)] for name, m in metrics.items()]
    known = "".join(f"\n\n{name}: {note}." for name, m in metrics.items() for note in m.notes)
    compared = [[f"against {name}", interval_text(d).replace("%", "points", 1)] for name, d in differences.items()]
    return (
        table(["network", *(titles[s] for s in SCORES)], rows)
        + "\n\nWith 95 % bootstrap intervals over the test pictures. Difference in accuracy of the network with "
        "sequence normalisation, on the same pictures:\n\n"
        + table(["", "accuracy gained"], compared)
        + "\n\nThe softmax twin differs in its attention alone and was trained in the same way. Logistic regression "
        "sees all pixels. The last one is the same network, trained and tested on the pictures reduced fourfold: what "
        f"resolution is worth.{known}\n\n![accuracy](accuracy.png)\n\n![ROC](roc.png)\n\n![confusion](confusion.png)"
    )


def _large(large: Sequence["Large"], plan: "Plan", scaling: list[dict[str, Any]]) -> str:
    right = sum(a.label == a.predicted for a in large)
    seconds = np.median([a.seconds for a in large])
    peaks = [
        r["peak_mib"] or 1 for r in scaling if r["image_px"] == CELL * plan.large_cells and "chunks" in r["mechanism"]
    ]
    memory = f", with {peaks[0]:.0f} MiB of memory beyond the picture and the network" if peaks else ""
    wrong = Counter(f"{a.label} taken for {a.predicted}" for a in large if a.label != a.predicted)
    errors = f" Errors: {', '.join(f'{n} x {text}' for text, n in wrong.items())}." if wrong else ""
    return (
        f"The same weights on {len(large)} mosaics of {CELL * plan.large_cells:,} x {CELL * plan.large_cells:,} px, "
        f"{plan.large_cells**2:,} tokens each, exact attention over all of them: **{right} of {len(large)} right**, "
        f"{seconds:.1f} s each{memory}.{errors}\n\n![heat map of a large mosaic](heatmap_large.png)\n\n"
        "![its upper left corner](heatmap_detail.png)"
    )


def _looks(pointing: float, plan: "Plan") -> str:
    return (
        "The score of a cell is the derivative of the class's log-odds by the cell's weight in every sum over tokens: "
        "the effect of taking it away, sign reversed, for all cells in one backward pass. Over the first "
        f"{plan.explained} test pictures the scores tell cells of the frequent digit from others with an area under "
        f"the ROC curve of **{pointing:.3f}** (0.5 is chance). No cell was ever labelled in training.\n\n"
        "![heat map](heatmap.png)"
    )


def _costs(scaling: list[dict[str, Any]]) -> str:
    rows = [
        [
            r["mechanism"],
            f"{r['image_px']:,} px",
            r["tokens"],
            r["reason"] or f"{r['seconds']:.3f} s",
            "" if r["reason"] else "below 1 MiB" if r["peak_mib"] is None else f"{r['peak_mib']:.0f} MiB",
        ]
        for r in scaling
    ]
    return (
        "One forward pass of one picture through the three layers, each mechanism in a process of its own:\n\n"
        "![scaling](scaling.png)\n\n" + table(["attention", "side", "tokens", "time", "memory"], rows)
    )


def _training(run: Run, predictor: Predictor) -> str:
    cost = cost_of(run)
    lines = [["network", run.config.model.name], ["parameters", num_parameters(predictor.network)], *cost.items()]
    return table(["", ""], [list(line) for line in lines]) + "\n\n![curves](curves.png)"


def _again(run: Run) -> str:
    environment = "\n".join(f"* {k}: {v}" for k, v in run.info["environment"].items())
    return (
        f"```sh\nsansmax demo --seed {run.config.seed}\n```\n\nThe figures of the networks are the same to the last "
        f"digit on the same machine with the same versions; times are not.\n\n{environment}"
    )
