"""Several runs on bags of features, or cross-validations, against the first of them, case by case."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sansmax.engine.bag_run import is_bag_run
from sansmax.engine.compare_cases import Comparison, compare
from sansmax.engine.cross_validate import MARK
from sansmax.errors import InputError, listed
from sansmax.files import write_text
from sansmax.report.case_metrics import TITLES
from sansmax.report.html import Lines, Section, Table, Text, write_page
from sansmax.report.metrics import RESAMPLES
from sansmax.report.paired import holm
from sansmax.report.summary import bullets, interval_text, table, write_summary
from sansmax.report.tables import as_csv, written

HOW = (
    "Differences are those of a run minus the first one on the cases that both predicted, with 95 % intervals of the "
    "paired bootstrap over patients; an interval without 0 says that they differ on patients of this kind. p: DeLong's "
    "test, in brackets after Holm's correction for the number of runs compared."
)


def are_of_bags(folders: Sequence[Path]) -> bool:
    """Whether the runs are on bags; InputError where some are and some are not."""
    of_bags = [folder for folder in folders if (folder / MARK).is_file() or is_bag_run(folder)]
    if of_bags and len(of_bags) < len(folders):
        others = [str(folder) for folder in folders if folder not in of_bags]
        raise InputError(
            f"{listed([str(f) for f in of_bags])} are of bags of features, {listed(others)} are not; compare like with "
            "like"
        )
    return bool(of_bags)


def compare_bags(runs: Sequence[str | Path], output: str | Path, *, resamples: int = RESAMPLES, seed: int = 0) -> str:
    """Compares runs with the first, writes compare.md, compare.html and compare.csv, and returns it as text.

    Raises InputError where they are of other tasks, targets or classes, or share no case.
    """
    first, *others = [Path(run) for run in runs]
    found = {str(run): compare(run, first, resamples=resamples, seed=seed) for run in others}
    folder, title, (headers, rows) = Path(output), f"Comparison with {first}", score_rows(found)
    tests, notes = test_rows(found), list(dict.fromkeys(n for c in found.values() for n in c.notes))
    about = "; ".join(f"{n}: {c.cases:,} cases of {c.patients:,} patients" for n, c in found.items())
    tables: list[tuple[str, Any]] = [("Differences", (headers, rows))]
    tables += [("Tests", (headers, tests))] if tests else []
    sections: list[Section] = [(name, [Table(*content)]) for name, content in tables]
    sections.append(("How to read this", [Text(HOW), *([Lines(notes)] if notes else [])]))
    write_page(folder / "compare.html", title, [Text(about)], sections)
    plain = [("", about), *((name, table(*content)) for name, content in tables)]
    write_summary(folder / "compare.md", title, [*plain, ("How to read this", HOW + "\n\n" + bullets(notes))])
    write_text(folder / "compare.csv", as_csv(csv_lines(found)))
    return "\n\n".join(f"a = {name}, b = {first}\n{c.text()}" for name, c in found.items())


def score_rows(found: dict[str, Comparison]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: the difference of each score and run."""
    names = next(iter(found.values())).differences
    rows = [[TITLES[n], *(interval_text(c.differences[n], percent=False) for c in found.values())] for n in names]
    return ["", *found], rows


def test_rows(found: dict[str, Comparison]) -> list[list[str]]:
    """DeLong's p of each class and run."""
    rows = []
    for name in next(iter(found.values())).delong:
        tests = [c.delong.get(name) for c in found.values()]
        adjusted = iter(holm([t.p for t in tests if t is not None]))
        rows.append(
            [f"AUROC of {name}, DeLong p", *("" if t is None else f"{t.p:.3g} ({next(adjusted):.3g})" for t in tests)]
        )
    return rows


def csv_lines(found: dict[str, Comparison]) -> list[list[str]]:
    """A row for each run and score."""
    lines = [["run", "score", "difference", "difference_low", "difference_high"]]
    for name, comparison in found.items():
        for score, gap in comparison.differences.items():
            lines.append([name, score, *map(written, (gap.value, gap.low, gap.high))])
    return lines
