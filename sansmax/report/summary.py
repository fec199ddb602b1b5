"""The page of a run: what was measured, how well it went, what it cost, how to do it again."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.files import write_text
from sansmax.report.metrics import TITLES, Metrics
from sansmax.report.resample import Interval

AS_PERCENT = ("accuracy", "balanced_accuracy")
MOST_CLASSES = 30
RESEARCH = (
    "For research use only. This model is not a medical device; its numbers hold for images like those it was "
    "tested on, and it must not be used for decisions about patients."
)


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns whose cells all start as numbers do are aligned at the right."""
    cells = [[cell_text(value) for value in row] for row in rows]
    for row in cells:
        assert len(row) == len(headers), f"{len(row)} cells under {len(headers)} headers"
    columns = list(zip(*cells, strict=True)) or [()] * len(headers)
    marks = ["---:" if column and all(map(is_number, column)) else "---" for column in columns]
    lines = [[cell_text(h) for h in headers], marks, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell_text(value: Any) -> str:
    """A value as it stands in a table, unable to break it."""
    if value is None:
        return ""
    if isinstance(value, Interval):
        return interval_text(value)
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return " ".join(str(value).split()).replace("|", "\\|")


def is_number(cell: str) -> bool:
    """Whether a cell reads as a number, or as none where numbers are."""
    return cell in ("", "not defined") or re.match(r"[-+]?\d[\d,.]*( |$|%|e)", cell) is not None


def interval_text(interval: Interval, percent: bool = True) -> str:
    """The interval in words, "98.4 % (97.6 to 99.1)", or with `percent=False` "0.984 (0.976 to 0.991)"."""
    if np.isnan(interval.value):
        return "not defined"
    scale, form, unit = (100, ".1f", " %") if percent else (1, ".3f", "")
    text = f"{scale * interval.value:{form}}{unit}"
    if np.isnan(interval.low):
        return text
    return f"{text} ({scale * interval.low:{form}} to {scale * interval.high:{form}})"


def score_text(name: str, interval: Interval) -> str:
    """A score of `Metrics` the way it is usually given: accuracies in per cent, the others as fractions."""
    return interval_text(interval, percent=name in AS_PERCENT)


def write_summary(path: str | Path, title: str, sections: Sequence[tuple[str, str]]) -> Path:
    """A Markdown page of `(heading, text)` sections; an empty heading continues, an empty text leaves it out."""
    parts = [f"# {title}"]
    for heading, text in sections:
        if text.strip():
            parts += ([f"## {heading}"] if heading else []) + [text.strip()]
    return write_text(path, "\n\n".join(parts) + "\n")


def run_summary(
    path: str | Path,
    *,
    title: str,
    command: str,
    data_lines: Sequence[str],
    model_name: str,
    parameters: int,
    cost: Mapping[str, Any],
    metrics: Metrics,
    others: Mapping[str, Metrics],
    figures: Sequence[tuple[str, str]],
    notes: Sequence[str],
    environment: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `summary.md` of a run.

    `others` are models measured on the same images, to compare with. `figures` are `(caption, path relative to the
    page)`. `model`, `settings`, `cost` and `environment` are shown as they are.
    """
    every = [*metrics.notes, *notes]
    sections = [
        ("", headline(model_name, parameters, metrics)),
        ("Results", score_table(model_name, metrics, others) + "\n\n" + how_to_read(metrics)),
        ("Each class", class_table(metrics)),
        ("Worth knowing", bullets(every)),
        ("Data", bullets(data_lines)),
        ("Model", table(["", ""], list(model.items())) if model else ""),
        ("Settings that are not the defaults", table(["", ""], list(settings.items())) if settings else ""),
        ("Cost", table(["", ""], list(cost.items())) if cost else ""),
        ("Pictures", "\n\n".join(figure_text(caption, link) for caption, link in figures)),
        ("Do it again", f"```sh\n{command.strip()}\n```\n\n" + bullets([f"{k}: {v}" for k, v in environment.items()])),
        ("Use", RESEARCH),
    ]
    return write_summary(path, title, sections)


def headline(model_name: str, parameters: int, metrics: Metrics) -> str:
    """The main numbers in one sentence."""
    size = f"{parameters / 1e6:.1f} million" if parameters >= 1e6 else f"{parameters:,}"
    scores = [
        f"{TITLES[name]} {score_text(name, metrics[name])}"
        for name in ("auc", "accuracy", "kappa")
        if name in metrics and not np.isnan(metrics[name].value)
    ]
    return f"**{model_name}** ({size} parameters) reaches **{', '.join(scores)}** on {tested(metrics)}."


def tested(metrics: Metrics) -> str:
    """How many images, and of how many patients."""
    images = f"{metrics.images:,} test image{'s' * (metrics.images != 1)}"
    if metrics.patients is None:
        return images
    return f"{images} of {metrics.patients:,} patient{'s' * (metrics.patients != 1)}"


def how_to_read(metrics: Metrics) -> str:
    """What the brackets are."""
    unit = "images" if metrics.patients is None else "patients"
    return (
        f"Brackets: 95 % interval over {metrics.resamples:,} resamples of the test {unit} (percentile bootstrap). "
        "It tells how much another test set would vary, not another training. Log loss and calibration error: "
        "smaller is better; all others: larger is better, 1 or 100 % is perfect."
    )


def score_table(model_name: str, metrics: Metrics, others: Mapping[str, Metrics]) -> str:
    """Scores as rows, models as columns."""
    return table(*score_rows({model_name: metrics, **others}))


def score_rows(every: Mapping[str, Metrics]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: the scores of the first model, a column for each model."""
    first = next(iter(every.values()))
    rows = [
        [TITLES.get(name, name), *(score_text(name, m[name]) if name in m else "" for m in every.values())]
        for name in first
    ]
    return ["", *every], rows


def class_table(metrics: Metrics) -> str:
    """One row per class; of many classes those recognised worst."""
    headers, rows, more = class_rows(metrics)
    return (more + "\n\n" if more else "") + table(headers, rows)


def class_rows(metrics: Metrics) -> tuple[list[str], list[list[Any]], str]:
    """Headers and rows of the table of classes, and what to say of those that are left out."""
    shown = list(metrics.classes)
    more = ""
    if len(shown) > MOST_CLASSES:
        more = f"The {MOST_CLASSES} of {len(shown)} classes with the lowest sensitivity."
        shown = sorted(shown, key=lambda c: (np.isnan(c.recall.value), c.recall.value))[:MOST_CLASSES]
    headers = ["class", "images", "sensitivity", "specificity", "precision", "AUC"]
    rows = [
        [c.name, c.images, c.recall, c.specificity, c.precision, interval_text(c.auc, percent=False)] for c in shown
    ]
    return headers, rows, more


def bullets(lines: Sequence[str]) -> str:
    """A list of lines."""
    return "\n".join(f"- {' '.join(str(line).split())}" for line in lines)


def figure_text(caption: str, link: str) -> str:
    """A picture with its caption; blanks and brackets of the path are escaped."""
    target = str(link).replace("\\", "/").replace(" ", "%20").replace("(", "%28").replace(")", "%29")
    return f"![{caption}]({target})\n\n*{caption}*"
