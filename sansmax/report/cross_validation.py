"""The report of a cross-validation: scores of all out-of-fold predictions, of each fold, pictures, and the page."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.files import write_text
from sansmax.report.case_metrics import PRIMARY, TITLES, CaseMetrics, measure_cases
from sansmax.report.case_predictions import CasePredictions
from sansmax.report.confusion import confusion_matrix
from sansmax.report.delong import auc_interval
from sansmax.report.fold_curves import fold_curves
from sansmax.report.regression import scatter
from sansmax.report.resample import Interval
from sansmax.report.summary import RESEARCH, bullets, figure_text, interval_text, score_text, table, write_summary
from sansmax.report.survival_curves import survival_curves

MOST_PICTURES = 12
FOLD_RESAMPLES = 400
SMALLER = ("mae", "brier", "log_loss", "calibration_error")
Figures = list[tuple[str, str]]


def report_cross_validation(
    folder: str | Path, preds: CasePredictions, notes: Sequence[str], info: Mapping[str, Any]
) -> tuple[CaseMetrics, tuple[CaseMetrics, ...]]:
    """Measures predictions, writes metrics.json, pictures and summary.md into the folder; returns the metrics.

    The first metrics are of all cases together, the others of each fold. `info` holds `command` and `environment`.
    """
    folder = Path(folder)
    metrics = measured(preds)
    each = tuple(measured(preds.in_fold(k), FOLD_RESAMPLES) for k in np.unique(preds.folds).tolist())
    text = json.dumps({"all": metrics.to_dict(), "folds": [m.to_dict() for m in each]}, indent=2, ensure_ascii=False)
    write_text(folder / "metrics.json", text + "\n")
    figures = draw(folder, preds, metrics)
    write_page(folder / "summary.md", preds, metrics, each, figures, [*notes, *metrics.notes], info)
    return metrics, each


def measured(preds: CasePredictions, resamples: int = 2000) -> CaseMetrics:
    """The scores of predictions, resampled by patient."""
    return measure_cases(
        preds.task,
        preds.targets,
        preds.predictions,
        preds.classes,
        groups=preds.groups,
        folds=preds.folds,
        resamples=resamples,
    )


def draw(folder: Path, preds: CasePredictions, metrics: CaseMetrics) -> Figures:
    """The pictures that suit the task; caption and file name of each."""
    if preds.task == "survival":
        unit, c_index = preds.target[0], metrics.scores["c_index"]
        survival_curves(
            preds.targets,
            preds.predictions[:, 0],
            folder / "survival.png",
            folds=preds.folds,
            c_index=c_index,
            unit=unit,
        )
        return [("Survival of the halves of lower and higher predicted risk", "survival.png")]
    if preds.task == "regression":
        return draw_values(folder, preds, metrics)
    figures = draw_curves(folder, preds, metrics)
    if preds.task == "classification":
        unit = "patient" if preds.patients is None else "slide"
        confusion_matrix(preds.targets, preds.predictions, preds.classes, folder / "confusion.png", unit=unit)
        figures.append(("True against predicted class", "confusion.png"))
    return figures


def draw_values(folder: Path, preds: CasePredictions, metrics: CaseMetrics) -> Figures:
    """A scatter plot of each measurement."""
    figures: Figures = []
    for i, name in enumerate(preds.classes[:MOST_PICTURES]):
        file = f"scatter{'' if len(preds.classes) == 1 else '_' + safe(name)}.png"
        known = np.isfinite(preds.targets[:, i])
        if known.any():
            truth, predicted, scores = preds.targets[:, i], preds.predictions[:, i], dict(metrics.by_class[name])
            scatter(truth, predicted, name, folder / file, scores=scores, folds=preds.folds)
            figures.append((f"Predicted against true {name}", file))
    return figures


def draw_curves(folder: Path, preds: CasePredictions, metrics: CaseMetrics) -> Figures:
    """ROC and precision-recall curves: of two classes of the last one, else of each class or label."""
    two = preds.task == "classification" and len(preds.classes) == 2
    figures: Figures = []
    for i, name in list(enumerate(preds.classes))[1 if two else 0 :][:MOST_PICTURES]:
        file = "curves.png" if two else f"curves_{safe(name)}.png"
        truth = preds.targets if preds.task == "classification" else preds.targets[:, i]
        known = np.isfinite(truth)
        own = preds.pick(np.flatnonzero(known))
        positive = truth[known] == (i if preds.task == "classification" else 1)
        areas = metrics.by_class[name]
        fold_curves(
            positive,
            own.predictions[:, i],
            own.folds,
            f"{preds.target[0]} = {name}" if preds.task == "classification" else name,
            folder / file,
            groups=own.groups,
            auc=areas["auc"],
            average_precision=areas["average_precision"],
        )
        figures.append((f"ROC and precision-recall curves of {name}, each fold and all together", file))
    return figures


def safe(name: str) -> str:
    """A name that every disk takes as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name)


def write_page(
    path: Path,
    preds: CasePredictions,
    metrics: CaseMetrics,
    each: Sequence[CaseMetrics],
    figures: Figures,
    notes: Sequence[str],
    info: Mapping[str, Any],
) -> None:
    """Writes summary.md."""
    environment = [f"{k}: {v}" for k, v in info.get("environment", {}).items()]
    command = str(info.get("command") or "")
    sections = [
        ("", headline(preds, metrics, len(each), names_of(info))),
        ("Results", score_rows(metrics, each) + "\n\n" + how_to_read(preds, metrics)),
        ("Each fold", fold_rows(preds, each)),
        ("Each " + ("class" if preds.task == "classification" else "target"), class_rows(metrics)),
        ("Worth knowing", bullets(notes)),
        ("Pictures", "\n\n".join(figure_text(caption, link) for caption, link in figures)),
        ("Do it again", (f"```sh\n{command.strip()}\n```\n\n" if command else "") + bullets(environment)),
        ("Use", RESEARCH),
    ]
    write_summary(path, f"Cross-validation of {', '.join(preds.target[:4])}", sections)


def names_of(info: Mapping[str, Any]) -> str:
    """The networks of the configurations, where these name them."""
    configs = [c for c in info.get("settings", {}).get("configurations", []) if isinstance(c, dict)]
    models = [c["model"].get("name") for c in configs if isinstance(c.get("model"), dict)]
    return " or ".join(dict.fromkeys(str(name) for name in models if name))


def headline(preds: CasePredictions, metrics: CaseMetrics, folds: int, model: str = "") -> str:
    """The main score in one sentence."""
    name, _ = PRIMARY[metrics.task]
    unit = "patients" if preds.patients is None else f"slides of {metrics.patients:,} patients"
    score = f"{TITLES[name]} {score_text(name, metrics.scores[name])}"
    return (
        f"**{model}{': ' * bool(model)}{score}** on {metrics.cases:,} {unit}, each predicted by "
        f"networks of one of {folds} folds that never saw them."
    )


def score_rows(metrics: CaseMetrics, each: Sequence[CaseMetrics]) -> str:
    """A row per score: all cases together, and the mean and spread of the folds."""
    rows = []
    for name, interval in metrics.scores.items():
        own = np.array([m.scores[name].value for m in each])
        own = own[np.isfinite(own)]
        spread = (
            f"{own.mean():.3f} +- {own.std(ddof=1):.3f}" if len(own) > 1 else f"{own.mean():.3f}" if len(own) else ""
        )
        rows.append([TITLES[name], interval_text(interval, percent=False), spread])
    return table(["", "all cases (95 % interval)", "mean of the folds +- standard deviation"], rows)


def how_to_read(preds: CasePredictions, metrics: CaseMetrics) -> str:
    """What the brackets are, and what is smaller where it is better."""
    smaller = [TITLES[name] for name in metrics.scores if name in SMALLER]
    lines = [
        f"Brackets: 95 % interval over {metrics.resamples:,} resamples of the patients (percentile bootstrap). "
        "It tells how much another set of patients would vary, not another training.",
        (f"{', '.join(smaller)}: smaller is better; all others: larger." if smaller else "Larger is better."),
    ]
    if len(np.unique(preds.folds)) < 2:
        pass
    elif metrics.task == "survival":
        lines.append("Only patients of one fold are compared: risks of two networks have no common scale.")
    else:
        lines.append("All cases together rank the outputs of several networks on one scale; the folds do not.")
    if by_delong := delong_line(preds):
        lines.append(by_delong)
    return " ".join(lines)


def delong_line(preds: CasePredictions) -> str:
    """The interval by DeLong beside that of the bootstrap: of two classes, where each patient is one case."""
    if preds.task != "classification" or len(preds.classes) != 2 or len(set(preds.groups)) < len(preds.groups):
        return ""
    interval: Interval = auc_interval(preds.targets == 1, preds.predictions[:, 1])
    return "" if np.isnan(interval.low) else f"AUROC by DeLong: {interval_text(interval, percent=False)}."


def fold_rows(preds: CasePredictions, each: Sequence[CaseMetrics]) -> str:
    """A row per fold with its main scores."""
    main = ("auc", "average_precision", "balanced_accuracy", "c_index", "r2", "pearson", "mae")
    names = [n for n in main if n in each[0].scores][:4]
    rows = [
        [str(k), m.cases, *(interval_text(m.scores[n], percent=False) for n in names)]
        for k, m in zip(np.unique(preds.folds).tolist(), each, strict=True)
    ]
    return table(["fold", "cases", *(TITLES[n] for n in names)], rows)


def class_rows(metrics: CaseMetrics) -> str:
    """A row per class or target; nothing where there is one only."""
    return "" if len(metrics.by_class) < 2 else table(*class_cells(metrics))


def class_cells(metrics: CaseMetrics) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of each class or target."""
    names = list(next(iter(metrics.by_class.values())))
    words = {"recall": "sensitivity"}
    rows = [[c, *(interval_text(own[n], percent=False) for n in names)] for c, own in metrics.by_class.items()]
    return ["", *(TITLES.get(n, words.get(n, n)) for n in names)], rows
