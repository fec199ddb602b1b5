"""The page of one trained slide classifier: scores of the cases kept apart, pictures, and how to do it again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sansmax.files import write_text
from sansmax.report.case_metrics import PRIMARY, TITLES, CaseMetrics
from sansmax.report.case_predictions import CasePredictions
from sansmax.report.cross_validation import class_cells, class_rows, draw, how_to_read, measured
from sansmax.report.curves import learning_curves
from sansmax.report.html import Code, Figures, Lines, Section, Table, Text, write_page
from sansmax.report.summary import RESEARCH, bullets, figure_text, interval_text, score_text, table, write_summary


def report_cases(
    folder: str | Path,
    preds: CasePredictions,
    part: str,
    notes: Sequence[str],
    info: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
) -> CaseMetrics:
    """Measures predictions of one network, writes metrics.json, pictures, summary.md, report.html; returns the metrics.

    `part` says which cases these are, "test" or "validation"; `rows` are those of metrics.csv, for the learning curves.
    `info` holds model, command and environment.
    """
    import json

    folder = Path(folder)
    metrics = measured(preds)
    write_text(folder / "metrics.json", json.dumps({part: metrics.to_dict()}, indent=2, ensure_ascii=False) + "\n")
    figures = draw(folder, preds, metrics)
    if rows:
        learning_curves(rows, folder / "learning.png", monitor=str(info.get("monitor", "")))
        figures.append(("Learning curves", "learning.png"))
    every = [note for note in (*notes, *metrics.notes) if note]
    _write_page(folder / "summary.md", preds, metrics, part, figures, every, info)
    _write_html(folder, preds, metrics, part, figures, every, info)
    return metrics


def _write_html(
    folder: Path,
    preds: CasePredictions,
    metrics: CaseMetrics,
    part: str,
    figures: Sequence[tuple[str, str]],
    notes: Sequence[str],
    info: Mapping[str, Any],
) -> None:
    scores = _scores(metrics)
    command = str(info.get("command") or "").strip()
    environment = [[name, value] for name, value in info.get("environment", {}).items()]
    sections: list[Section] = [
        ("Results", [Table(["", "95 % interval"], scores, note=how_to_read(preds, metrics))]),
        (_each(preds), [Table(*class_cells(metrics))] if len(metrics.by_class) > 1 else []),
        ("Worth knowing", [Lines(notes)] if notes else []),
        ("Pictures", [Figures([(caption, folder / name) for caption, name in figures])]),
        (
            "Do it again",
            [*([Code(command)] if command else []), *([Table(["", ""], environment)] if environment else [])],
        ),
        ("Use", [Text(RESEARCH)]),
    ]
    lead = [Text(headline(metrics, part).replace("**", ""))]
    write_page(folder / "report.html", _title(preds, info), lead, sections)


def _scores(metrics: CaseMetrics) -> list[list[str]]:
    return [[TITLES[name], interval_text(value, percent=False)] for name, value in metrics.scores.items()]


def _each(preds: CasePredictions) -> str:
    return "Each class" if preds.task == "classification" else "Each target"


def _title(preds: CasePredictions, info: Mapping[str, Any]) -> str:
    return f"{info.get('model', 'A slide classifier')} on {', '.join(preds.target[:4])}"


def _write_page(
    path: Path,
    preds: CasePredictions,
    metrics: CaseMetrics,
    part: str,
    figures: Sequence[tuple[str, str]],
    notes: Sequence[str],
    info: Mapping[str, Any],
) -> None:
    command = str(info.get("command") or "")
    scores = _scores(metrics)
    environment = [f"{k}: {v}" for k, v in info.get("environment", {}).items()]
    sections = [
        ("", headline(metrics, part)),
        ("Results", table(["", "95 % interval"], scores) + "\n\n" + how_to_read(preds, metrics)),
        (_each(preds), class_rows(metrics)),
        ("Worth knowing", bullets(notes)),
        ("Pictures", "\n\n".join(figure_text(caption, link) for caption, link in figures)),
        ("Do it again", (f"```sh\n{command.strip()}\n```\n\n" if command else "") + bullets(environment)),
        ("Use", RESEARCH),
    ]
    write_summary(path, _title(preds, info), sections)


def headline(metrics: CaseMetrics, part: str) -> str:
    """The main score in one sentence."""
    name, _ = PRIMARY[metrics.task]
    of = f" of {metrics.patients:,} patients" if metrics.patients != metrics.cases else ""
    kept = "which training never saw" if part == "test" else "by which the epoch was chosen: it flatters"
    return f"**{TITLES[name]} {score_text(name, metrics.scores[name])}** on {metrics.cases:,} {part} cases{of}, {kept}."
