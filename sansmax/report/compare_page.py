"""The page of several runs side by side: compare.md, compare.html, compare.csv and their pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sansmax.files import write_text
from sansmax.report.compare_curves import Rows, curves_of_runs, difference_picture
from sansmax.report.html import Block, Figures, Lines, Section, Table, Text, write_page
from sansmax.report.metrics import TITLES, Metrics
from sansmax.report.paired import Pair
from sansmax.report.resample import Interval, none_for_nan
from sansmax.report.summary import AS_PERCENT, MOST_CLASSES, bullets, figure_text, score_rows, table, write_summary
from sansmax.report.tables import as_csv, written

COLUMNS = ("run", "score", "value", "low", "high", "difference", "difference_low", "difference_high")
TESTS = ("p_mcnemar", "p_mcnemar_holm", "p_delong", "p_delong_holm")
HOW = (
    "Differences are those of a run minus the first one on the same images, with 95 % intervals of the paired "
    "bootstrap; an interval without 0 says that the runs differ on images of this kind. They tell nothing of how much "
    "another training of the same recipe would vary. p: exact McNemar test for accuracy, DeLong's test for AUC; in "
    "brackets after Holm's correction for the number of these tests."
)


@dataclass(frozen=True)
class RunsFacts:
    """Several runs on the same images: `pairs` are the runs after the first, each against it."""

    split: str
    images: int
    patients: int | None
    metrics: Mapping[str, Metrics]
    pairs: Mapping[str, Pair]
    cost: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Rows]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The tables as plain lines."""
        parts = [self.about(), plain_table(*score_rows(self.metrics)), plain_table(*difference_rows(self))]
        tests = plain_table(*test_rows(self)) if any(pair.mcnemar for pair in self.pairs.values()) else ""
        return "\n\n".join(
            part for part in (*parts, tests, plain_table(*cost_rows(self)), "\n".join(self.notes)) if part
        )

    def about(self) -> str:
        """What is compared on what."""
        of = "" if self.patients is None else f" of {self.patients:,} patients"
        return f"{len(self.metrics)} runs on the same {self.images:,} {self.split} images{of}"


def write_comparison(output: str | Path, facts: RunsFacts) -> Path:
    """Writes the page in the folder `output`, with its pictures; returns the path of compare.md."""
    folder = Path(output)
    first = next(iter(facts.metrics))
    figures = [("By how much the runs differ from the first", "compare_differences.png")]
    difference_picture({n: p.differences for n, p in facts.pairs.items()}, first, folder / figures[0][1])
    if any(len(rows) for rows in facts.rows.values()):
        figures.append(("Learning curves of all runs", "compare_curves.png"))
        curves_of_runs({n: rows for n, rows in facts.rows.items() if len(rows)}, folder / figures[1][1])
    write_text(folder / "compare.csv", as_csv([[*COLUMNS, *TESTS], *csv_rows(facts)]))
    tables = [("Scores", score_rows(facts.metrics)), (f"Differences from {first}", difference_rows(facts))]
    if any(pair.mcnemar for pair in facts.pairs.values()):
        tables.append((f"Tests against {first}", test_rows(facts)))
    tables.append(("Cost", cost_rows(facts)))
    title = "Comparison of runs"
    sections: list[Section] = [(name, [Table(*content)]) for name, content in tables]
    pictures: list[Block] = [Figures([(caption, folder / name) for caption, name in figures])]
    read: list[Block] = [Text(HOW), *([Lines(facts.notes)] if facts.notes else [])]
    sections += [("Pictures", pictures), ("How to read this", read)]
    write_page(folder / "compare.html", title, [Text(f"{facts.about()}.")], sections)
    plain = [("", f"{facts.about()}."), *((name, table(*content)) for name, content in tables)]
    plain += [("Pictures", "\n\n".join(figure_text(*figure) for figure in figures))]
    return write_summary(
        folder / "compare.md", title, [*plain, ("How to read this", HOW + "\n\n" + bullets(facts.notes))]
    )


def difference_rows(facts: RunsFacts) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: scores, and the difference of each run from the first."""
    names = list(next(iter(facts.pairs.values())).differences)
    rows = [
        [TITLES.get(name, name), *(signed(name, pair.differences[name]) for pair in facts.pairs.values())]
        for name in names
    ]
    return ["", *facts.pairs], rows


def signed(name: str, gap: Interval) -> str:
    """A difference with its sign and interval: accuracies in points of per cent, the others as fractions."""
    if none_for_nan(gap.value) is None:
        return "not defined"
    scale, form, unit = (100, "+.1f", " points") if name in AS_PERCENT else (1, "+.3f", "")
    text = f"{scale * gap.value:{form}}{unit}"
    if none_for_nan(gap.low) is None:
        return text
    return f"{text} ({scale * gap.low:{form}} to {scale * gap.high:{form}})"


def test_rows(facts: RunsFacts) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: the tests, and what each run gives."""
    first = next(iter(facts.metrics))
    pairs = facts.pairs.values()
    rows = [
        [f"right where {first} is wrong", *(str(p.mcnemar.only_a) if p.mcnemar else "" for p in pairs)],
        [f"wrong where {first} is right", *(str(p.mcnemar.only_b) if p.mcnemar else "" for p in pairs)],
        ["accuracy, McNemar p", *(p_text(p.mcnemar.p if p.mcnemar else None, p.mcnemar_adjusted) for p in pairs)],
    ]
    for name in list(next(iter(pairs)).delong)[:MOST_CLASSES]:
        cells = [p_text(p.delong[name].p, p.delong_adjusted[name]) if name in p.delong else "" for p in pairs]
        rows.append([f"AUC of {name}, DeLong p", *cells])
    return ["", *facts.pairs], rows


def p_text(p: float | None, adjusted: float | None) -> str:
    """A p, and what is left of it after the correction."""
    return "" if p is None or adjusted is None else f"{p:.3g} ({adjusted:.3g})"


def cost_rows(facts: RunsFacts) -> tuple[list[str], list[list[Any]]]:
    """Headers and rows: what each run is and what it took."""
    names = list(dict.fromkeys(name for cost in facts.cost.values() for name in cost))
    return ["", *facts.cost], [[name, *(cost.get(name, "") for cost in facts.cost.values())] for name in names]


def csv_rows(facts: RunsFacts) -> list[list[str]]:
    """A row for each run and score; the tests stand beside the score that they are of."""
    out = []
    for run, metrics in facts.metrics.items():
        pair = facts.pairs.get(run)
        for name, value in metrics.items():
            gap = pair.differences[name] if pair is not None else Interval(float("nan"))
            numbers = [value.value, value.low, value.high, gap.value, gap.low, gap.high, *p_values(pair, name)]
            out.append([run, name, *map(written, numbers)])
    return out


def p_values(pair: Pair | None, score: str) -> list[float | None]:
    """The p of a score as compare.csv has them; DeLong's where there is one test of the AUC."""
    share: list[float | None] = [None, None]
    area: list[float | None] = [None, None]
    if pair is not None and score == "accuracy" and pair.mcnemar is not None:
        share = [pair.mcnemar.p, pair.mcnemar_adjusted]
    if pair is not None and score == "auc" and len(pair.delong) == 1:
        (name,) = pair.delong
        area = [pair.delong[name].p, pair.delong_adjusted[name]]
    return [*share, *area]


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as lines of text whose columns stand one below the other."""
    cells = [[str(c) for c in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
