"""What the page of a run on images shows, and in which order: report.html."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.report.html import Block, Case, Cases, Code, Figures, Lines, Section, Table, Text, Tiles, write_page
from sansmax.report.metrics import TITLES, Metrics
from sansmax.report.summary import RESEARCH, class_rows, headline, how_to_read, score_rows, score_text

FIRST = ("auc", "accuracy", "balanced_accuracy", "kappa", "calibration_error")


@dataclass(frozen=True)
class RunFacts:
    """All that is known of a run; mappings are shown as they are, `counts` is headers and rows of images per class.

    `figures` are captions and files; `worst` the errors made with the most confidence; `settings` those keys of the
    `configuration` that are not the defaults.
    """

    title: str
    model_name: str
    parameters: int
    metrics: Metrics
    split: str
    counts: tuple[Sequence[str], Sequence[Sequence[Any]]]
    data: Sequence[str]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    configuration: str
    cost: Mapping[str, Any]
    figures: Sequence[tuple[str, Path]]
    worst: Sequence[Case]
    notes: Sequence[str]
    command: str
    environment: Mapping[str, Any]


def write_run_page(path: str | Path, facts: RunFacts) -> Path:
    """Writes the page of a run as one HTML file."""
    metrics = facts.metrics
    scores = Table(*score_rows({facts.model_name: metrics}), note=how_to_read(metrics))
    headers, rows, more = class_rows(metrics)
    sections: list[Section] = [
        ("Results", [scores, *notes_of([*metrics.notes, *facts.notes])]),
        ("Each class", [Table(headers, rows, note=more)]),
        ("Pictures", [Figures(facts.figures)] if facts.figures else []),
        ("Errors made with the most confidence", errors_of(facts)),
        ("Data", [Lines(facts.data), Table(*facts.counts, note="Images of each class and split.")]),
        ("Model", pairs(facts.model)),
        ("Settings", [*settings_of(facts), Code(facts.configuration, "the whole configuration")]),
        ("Cost", pairs(facts.cost)),
        ("Do it again", [Code(facts.command), *pairs(facts.environment)]),
        ("Use", [Text(RESEARCH)]),
    ]
    lead = [Text(headline(facts.model_name, facts.parameters, metrics).replace("**", "")), tiles(metrics)]
    return write_page(path, facts.title, lead, sections)


def tiles(metrics: Metrics) -> Tiles:
    """The main scores, each with its interval below."""
    out = []
    for name in FIRST:
        if name in metrics and not np.isnan(metrics[name].value):
            value, _, interval = score_text(name, metrics[name]).partition(" (")
            out.append((TITLES[name], value, f"95 %: {interval.rstrip(')')}" if interval else "no interval"))
    return Tiles(out)


def notes_of(notes: Sequence[str]) -> list[Block]:
    """What a reader has to know."""
    return [Text("", strong="Worth knowing"), Lines(notes)] if notes else []


def errors_of(facts: RunFacts) -> list[Block]:
    """The worst errors, with what to see in them."""
    if not facts.worst:
        return [Text(f"None: every one of the {facts.metrics.images:,} images is answered rightly.")]
    maps = any(len(case.pictures) > 1 for case in facts.worst)
    legend = (
        "On the right of each picture what speaks for the wrong answer (red), and against it (blue)." if maps else ""
    )
    return [Cases(facts.worst), *([Text(legend, note=True)] if legend else [])]


def settings_of(facts: RunFacts) -> list[Block]:
    """What was set."""
    if not facts.settings:
        return [Text("All settings are the defaults.")]
    return [
        Table(["key", "value"], [list(item) for item in facts.settings.items()], note="All others are the defaults.")
    ]


def pairs(values: Mapping[str, Any]) -> list[Block]:
    """Names and values."""
    return [Table(["", ""], [[name, as_text(value)] for name, value in values.items()])] if values else []


def as_text(value: Any) -> Any:
    """A number with its thousands apart, everything else as it is."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
